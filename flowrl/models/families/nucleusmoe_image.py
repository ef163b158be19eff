"""Nucleus-Image, a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch

from flowrl.models.families.qwen_image import QwenImageFlow
from flowrl.types import Condition


class NucleusMoEImageFlow(QwenImageFlow):
    """A `NucleusMoEImagePipeline`: guidance, mask and autoencoder are Qwen-Image's.

    The system's message is part of a prompt, and counts among its tokens.
    """

    PIPELINE = "NucleusMoEImagePipeline"
    TRANSFORMER = "NucleusMoEImageTransformer2DModel"
    SEQUENCE_LENGTH = 1024
    PREDICTS_VELOCITY = True

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        return {**super().inputs(x, time, cond), "img_shapes": [(1, *self.grid)] * len(x)}
