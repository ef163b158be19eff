"""What families share whose networks take 2 x 2 patches of latents as tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from flowrl.models.packing import pack, unpack
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

    def with_norm_of(self, v: torch.Tensor, guided: torch.Tensor, most: float = torch.inf) -> torch.Tensor:
        """Give each token of guided velocities its norm in `v`, by a factor of at most `most`."""
        norm, guided_norm = (pack(x).norm(dim=-1, keepdim=True) for x in (v, guided))
        return unpack(pack(guided) * (norm / guided_norm).clamp(max=most), *self.grid)


class OneFrameFlow(TokensFlow):
    """A pipeline of tokens whose autoencoder is of videos, and is given one frame."""

    @classmethod
    def reduction(cls, vae: Mapping[str, Any]) -> int:
        """Compute the pixels per latent along each side."""
        return int(2 ** len(vae["temperal_downsample"]))

    def to_autoencoder(self, x_1: torch.Tensor) -> torch.Tensor:
        """Bring latents to the autoencoder's scale, as one frame."""
        return super().to_autoencoder(x_1)[:, :, None]


class PatchesFlow(TokensFlow):
    """A pipeline whose latents are 2 x 2 patches of the autoencoder's, normalised by statistics that it holds."""

    @classmethod
    def default_sides(cls, transformer: Mapping[str, Any]) -> tuple[int, int]:
        """Give the size of the pipeline's own call."""
        return LATENTS // 2, LATENTS // 2

    @classmethod
    def reduction(cls, vae: Mapping[str, Any]) -> int:
        """Compute the pixels per patch along each side."""
        return 2 * super().reduction(vae)

    @classmethod
    def patch(cls, transformer: Mapping[str, Any]) -> int:
        """Give 1: latents are patches already."""
        return 1

    @classmethod
    def channels(cls, transformer: Mapping[str, Any]) -> int:
        """Give the channels of a patch."""
        return int(transformer["in_channels"])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.latent_shape[1], self.latent_shape[2]

    def to_autoencoder(self, x_1: torch.Tensor) -> torch.Tensor:
        """Bring patches to the autoencoder's mean and deviation, and apart."""
        norm = self.pipeline.vae.bn
        deviation = (norm.running_var.float() + self.norm_epsilon).sqrt()
        return unpack((x_1.flatten(2).mT * deviation + norm.running_mean.float()), *self.grid)

    @property
    def norm_epsilon(self) -> float:
        """What is added to the autoencoder's variance."""
        return float(self.pipeline.vae.config.batch_norm_eps)
