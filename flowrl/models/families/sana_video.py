"""Sana of videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flowrl.errors import ConfigError
from flowrl.models.families.sana import SanaFlow
from flowrl.models.pipeline import PipelineOptions, Shapes
from flowrl.models.video import VideoFlow

OF_720 = 22
"""What the transformer's configuration says as its size where that is 720 pixels."""
SIDE = 32
"""Pixels that heights and widths are multiples of."""


class SanaVideoFlow(VideoFlow, SanaFlow):
    """A `SanaVideoPipeline`, with the autoencoder of Wan or of LTX-2; steps are Euler's, as in Sana."""

    PIPELINE = "SanaVideoPipeline"
    TRANSFORMER = "SanaVideoTransformer3DModel"
    FRAMES, SIDES, FRAME_RATE = 81, (480, 832), 16

    @classmethod
    def shapes(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], options: PipelineOptions) -> Shapes:
        """Compute shapes, of sides that the pipeline's own call takes."""
        found = super().shapes(transformer, vae, options)
        *_, height, width = found.sample
        if height % SIDE or width % SIDE:
            raise ConfigError(
                f"resolution must be a multiple of {SIDE} pixels for this pipeline, not {height}x{width}."
            )
        return found

    @classmethod
    def default_sides(cls, transformer: Mapping[str, Any]) -> tuple[int, int]:
        """Give the size of the pipeline's own call, by the size that the transformer was made for."""
        return (704, 1280) if transformer["sample_size"] == OF_720 else cls.SIDES

    @classmethod
    def reduction(cls, vae: Mapping[str, Any]) -> int:
        """Give the pixels per latent along each side."""
        return int(vae.get("spatial_compression_ratio") or vae["scale_factor_spatial"])

    @classmethod
    def frame_reduction(cls, vae: Mapping[str, Any]) -> int:
        """Give the frames per latent."""
        return int(vae.get("temporal_compression_ratio") or vae["scale_factor_temporal"])

    def to_autoencoder(self, x_1: torch.Tensor) -> torch.Tensor:
        """Bring latents to the scale of the autoencoder, whose mean and deviation may be weights of it."""
        vae = self.pipeline.vae
        if "latents_mean" in vae.config:
            return super().to_autoencoder(x_1)
        shape = (1, -1, 1, 1, 1)
        return x_1 * vae.latents_std.to(x_1).view(shape) + vae.latents_mean.to(x_1).view(shape)

    def call_settings(self, scale: float) -> dict[str, Any]:
        """Give the arguments of the pipeline's own call, which has a name of its own for frames."""
        return {**super().call_settings(scale), "frames": self.sample_shape[0]}
