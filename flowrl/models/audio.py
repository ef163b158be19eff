"""Audio pipelines of diffusers: what their families share. Latents are (C, T'), samples (channels, T) in [-1, 1]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from flowrl.errors import ConfigError
from flowrl.models.pipeline import PipelineFlow, PipelineOptions, Shapes

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
"""Projections of every attention, of a sound's frames to one another and to the text."""


class AudioFlow(PipelineFlow):
    """A flow pipeline that draws sounds; its `frames` are those of the latents."""

    FRAMES: ClassVar[int]
    """Frames of latents in the pipeline's own call."""
    DRAWN = "audios"
    lora_targets = ATTENTION

    @classmethod
    def shapes(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], options: PipelineOptions) -> Shapes:
        """Compute shapes from the configurations of the transformer and of the autoencoder."""
        if options.resolution is not None:
            raise ConfigError(
                f"A {cls.PIPELINE} draws sounds, which have no resolution: leave resolution out, and set frames, of "
                f"{cls.reduction(vae)} values each, {cls.values_per_second(vae)} of which are a second."
            )
        frames = cls.FRAMES if options.frames is None else options.frames
        if frames < 1:
            raise ConfigError(f"frames must be at least 1 for this pipeline, not {frames}.")
        return Shapes((cls.channels(transformer), frames), (int(vae["audio_channels"]), frames * cls.reduction(vae)))

    @classmethod
    def reduction(cls, vae: Mapping[str, Any]) -> int:
        """Compute the values of a sound per frame of latents."""
        return math.prod(vae["downsampling_ratios"])

    @classmethod
    def values_per_second(cls, vae: Mapping[str, Any]) -> int:
        """Give the sample rate."""
        return int(vae["sampling_rate"])

    @classmethod
    def default_sides(cls, transformer: Mapping[str, Any]) -> tuple[int, int]:
        """Give none: sounds have no sides."""
        return 0, 0

    @property
    def sequence_length(self) -> int:
        """Frames of latents of one sound."""
        return self.latent_shape[-1]

    @property
    def seconds(self) -> float:
        """Length of a sound, never a rounding above its frames."""
        vae = self.pipeline.vae.config
        rate = self.values_per_second(vae) / self.reduction(vae)
        seconds = self.latent_shape[-1] / rate
        return seconds if seconds * rate <= self.latent_shape[-1] else math.nextafter(seconds, 0)

    def outputs(self, predicted: torch.Tensor) -> torch.Tensor:
        """Bring what the network gives, channels last, into the shape of latents (B, C, T')."""
        return predicted.transpose(1, 2)

    def decode(self, x_1: torch.Tensor) -> torch.Tensor:
        """Decode latents to sounds (B, channels, T), float32 in [-1, 1]."""
        vae: Any = self.pipeline.vae
        vae.to(self.device)
        sounds = [vae.decode(chunk.to(vae.dtype), return_dict=False)[0] for chunk in x_1.split(self.decode_batch)]
        return self.at_level(torch.cat(sounds).float())

    def at_level(self, sounds: torch.Tensor) -> torch.Tensor:
        """Bring decoded sounds (B, channels, T) to the level of the pipeline's own, within [-1, 1]."""
        return sounds.clamp(-1, 1)
