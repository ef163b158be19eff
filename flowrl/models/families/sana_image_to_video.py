"""Sana that begins a video with a picture."""

from __future__ import annotations

from typing import Any

import torch

from flowrl.models.families.sana_video import SanaVideoFlow
from flowrl.models.first_frame import FirstFrameFlow
from flowrl.models.latent_scale import by_weights
from flowrl.models.pipeline import Part
from flowrl.types import Condition


class SanaImageToVideoFlow(FirstFrameFlow, SanaVideoFlow):
    """A `SanaImageToVideoPipeline`: the picture that comes with a prompt is the video's first frame."""

    PIPELINE = "SanaImageToVideoPipeline"

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments, with a time for each token."""
        return {**super().inputs(x, time, cond[:2]), "timestep": self.token_times(time)}

    def encode_text(self, prompts: list[str]) -> Condition:
        """Encode prompts as Sana does, after the instruction."""
        return SanaVideoFlow.encode_prompts(self, prompts)

    def encode_null(self) -> Condition:
        """Encode the empty prompt without the instruction, with zeros where `null_like` puts the picture."""
        return self.zeros_behind(SanaVideoFlow.encode_null(self))

    def text_parts(self) -> list[Part]:
        """Give the shapes of embeddings and mask."""
        return SanaVideoFlow.condition_parts(self)

    def from_autoencoder(self, modes: torch.Tensor) -> torch.Tensor:
        """Bring latents of the autoencoder to the scale of the flow's, by a mean and deviation that may be weights."""
        vae = self.pipeline.vae
        return super().from_autoencoder(modes) if "latents_mean" in vae.config else by_weights(modes, vae)
