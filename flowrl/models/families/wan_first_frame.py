"""Wan 2.2 of 5 billion weights that begins a video with a picture, in the place of the first latents."""

from __future__ import annotations

from typing import Any

import torch

from flowrl.models.families.wan import WanFlow
from flowrl.models.first_frame import FirstFrameFlow
from flowrl.models.pipeline import Part
from flowrl.models.text_encoders import cleaned_by_ftfy
from flowrl.types import Condition


class WanFirstFrameFlow(FirstFrameFlow, WanFlow):
    """A `WanImageToVideoPipeline` with `expand_timesteps`, that of Wan 2.2 of 5 billion weights."""

    PIPELINE = "WanImageToVideoPipeline"

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments, with a time for each token."""
        return {**super().inputs(x, time, cond[:1]), "timestep": self.token_times(time)}

    def encode_text(self, prompts: list[str]) -> Condition:
        """Encode prompts as Wan does."""
        with cleaned_by_ftfy(self.PIPELINE):
            return WanFlow.encode_prompts(self, prompts)

    def text_parts(self) -> list[Part]:
        """Give the shape of the context."""
        return WanFlow.condition_parts(self)
