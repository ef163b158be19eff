"""Kandinsky 5.0, of images."""

from __future__ import annotations

from typing import Any

import torch

from flowrl.models.families.kandinsky5 import Kandinsky5Flow
from flowrl.models.families.patches import PatchedFlow
from flowrl.types import Condition


class Kandinsky5ImageFlow(Kandinsky5Flow, PatchedFlow):
    """A `Kandinsky5T2IPipeline`. Resolutions are taken as they are: its own call draws the nearest of seven."""

    PIPELINE = "Kandinsky5T2IPipeline"
    LATENTS = 128
    DRAWN = "image"
    OWN_CALL = f"{Kandinsky5Flow.OWN_CALL} It has the nearest of seven sizes."

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments: latents of one frame."""
        return super().inputs(x[:, :, None], time, cond)

    def outputs(self, predicted: torch.Tensor) -> torch.Tensor:
        """Bring the frame into the shape of latents."""
        return super().outputs(predicted)[:, :, 0]
