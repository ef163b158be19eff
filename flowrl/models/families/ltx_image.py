"""LTX-Video that begins with a picture."""

from __future__ import annotations

from typing import Any

import torch

from flowrl.models.families.ltx import LTXFlow
from flowrl.models.first_frame import FirstFrameFlow
from flowrl.models.latent_scale import by_weights
from flowrl.models.pipeline import Part
from flowrl.types import Condition


class LTXImageToVideoFlow(FirstFrameFlow, LTXFlow):
    """An `LTXImageToVideoPipeline`: the picture that comes with a prompt is the video's first frame."""

    PIPELINE = "LTXImageToVideoPipeline"
    OWN_CALL = "Its own call draws the picture's latents from the autoencoder's posterior; a run takes the mode."

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments, with a time for each token."""
        return {**super().inputs(x, time, cond[:2]), "timestep": self.token_times(time)}

    def encode_text(self, prompts: list[str]) -> Condition:
        """Encode prompts as LTX-Video does."""
        return LTXFlow.encode_prompts(self, prompts)

    def text_parts(self) -> list[Part]:
        """Give the shapes of the context and its mask."""
        return LTXFlow.condition_parts(self)

    def from_autoencoder(self, modes: torch.Tensor) -> torch.Tensor:
        """Bring latents of the autoencoder to the scale of the flow's, by a mean and deviation that it holds."""
        return by_weights(modes, self.pipeline.vae)
