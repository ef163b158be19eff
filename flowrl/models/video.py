"""Video pipelines of diffusers: what their families share. Latents are (C, T', H', W'), samples (T, 3, H, W)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from flowrl.errors import ConfigError
from flowrl.models.packing import latent_sides
from flowrl.models.pipeline import PipelineFlow, PipelineOptions, Shapes

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
"""Projections of every attention, of a video's tokens to one another and to the text."""


class VideoFlow(PipelineFlow):
    """A flow pipeline that draws videos."""

    FRAMES: ClassVar[int]
    """Frames of a video in the pipeline's own call."""
    SIDES: ClassVar[tuple[int, int]]
    """Height and width in pixels in the pipeline's own call."""
    DRAWN = "frames"
    lora_targets = ATTENTION

    @classmethod
    def shapes(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], options: PipelineOptions) -> Shapes:
        """Compute shapes from the configurations of the transformer and of the autoencoder."""
        scale, every = cls.reduction(vae), cls.frame_reduction(vae)
        frames = cls.FRAMES if options.frames is None else options.frames
        if frames < 1 or (frames - 1) % every:
            near = max(0, round((frames - 1) / every)) * every + 1
            raise ConfigError(
                f"frames must be a multiple of {every} and one more for this pipeline, not {frames}; e.g. {near}."
            )
        size = cls.default_sides(transformer) if options.resolution is None else options.resolution
        height, width = latent_sides(size, (0, 0), scale, cls.patch(transformer), cls.most_patches(transformer))
        latent = (cls.channels(transformer), (frames - 1) // every + 1, height, width)
        return Shapes(latent, (frames, 3, height * scale, width * scale))

    @classmethod
    def default_sides(cls, transformer: Mapping[str, Any]) -> tuple[int, int]:
        """Give the size of the pipeline's own call, in pixels."""
        return cls.SIDES

    @classmethod
    def patch(cls, transformer: Mapping[str, Any]) -> int:
        """Give the side of a patch."""
        patch = transformer["patch_size"]
        return int(patch if isinstance(patch, int) else patch[-1])

    @classmethod
    def reduction(cls, vae: Mapping[str, Any]) -> int:
        """Give the pixels per latent along each side."""
        return int(vae["spatial_compression_ratio"])

    @classmethod
    def frame_reduction(cls, vae: Mapping[str, Any]) -> int:
        """Give the frames per latent; the first frame has a latent of its own."""
        return int(vae["temporal_compression_ratio"])

    @property
    def sequence_length(self) -> int:
        """Number of patches of one video."""
        _, frames, height, width = self.latent_shape
        network: Any = self.network
        patch = self.patch(network.config)
        return frames * (height // patch) * (width // patch)

    def decode(self, x_1: torch.Tensor) -> torch.Tensor:
        """Decode latents to videos (B, T, 3, H, W), float32 in [0, 1]; `decode_batch` counts frames."""
        vae: Any = self.pipeline.vae
        vae.to(self.device)
        at_once = max(1, self.decode_batch // self.sample_shape[0])
        latents = self.to_autoencoder(x_1).to(vae.dtype)
        videos = torch.cat([self.decode_latents(chunk, vae) for chunk in latents.split(at_once)])
        return (videos.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)

    def decode_latents(self, latents: torch.Tensor, vae: Any) -> torch.Tensor:
        """Decode latents of the autoencoder's scale to videos (B, 3, T, H, W) in [-1, 1]."""
        decoded: torch.Tensor = vae.decode(latents, return_dict=False)[0]
        return decoded


def as_tokens(x: torch.Tensor) -> torch.Tensor:
    """Put the latents (B, C, T', H', W') of a video into a row of tokens (B, T' H' W', C)."""
    return x.flatten(2).transpose(1, 2)
