"""What families share whose networks take 2 x 2 patches of latents as tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from flowrl.models.packing import unpack
from flowrl.models.pipeline import PipelineFlow

LATENTS = 128
"""Height and width of the latents when no resolution is asked for; the pipelines state it in code only."""


class TokensFlow(PipelineFlow):
    """A pipeline of tokens. Latents are (C, H, W) here; the network sees 2 x 2 patches of them, (H W / 4, 4 C)."""

    TIME_SCALE = 1.0

    @classmethod
    def default_sides(cls, transformer: Mapping[str, Any]) -> tuple[int, int]:
        """Give the size of the pipeline's own call."""
        return LATENTS, LATENTS

    @classmethod
    def channels(cls, transformer: Mapping[str, Any]) -> int:
        """Give the channels before 2 x 2 patches are packed."""
        return int(transformer["in_channels"]) // 4

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.latent_shape[1] // 2, self.latent_shape[2] // 2

    @property
    def sequence_length(self) -> int:
        """Number of tokens of one image."""
        rows, columns = self.grid
        return rows * columns

    def outputs(self, predicted: torch.Tensor) -> torch.Tensor:
        """Bring the network's tokens into the shape of latents."""
        return unpack(predicted, *self.grid)

    def sigmas(self, steps: int, config: Mapping[str, Any]) -> np.ndarray | None:
        """Space noise levels equally, down to 1 / steps, before the shift."""
        return None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
