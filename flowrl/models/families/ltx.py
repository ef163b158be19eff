"""LTX-Video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from flowrl.models.pipeline import Part
from flowrl.models.video import VideoFlow, as_tokens
from flowrl.types import Condition


class LTXFlow(VideoFlow):
    """An `LTXPipeline`. Latents are (C, T', H', W') here; the transformer sees each place of them as a token."""

    PIPELINE = "LTXPipeline"
    TRANSFORMER = "LTXVideoTransformer3DModel"
    SEQUENCE_LENGTH = 128
    FRAMES, SIDES, FRAME_RATE = 161, (512, 704), 25

    @classmethod
    def reduction(cls, vae: Mapping[str, Any]) -> int:
        """Give the pixels per latent along each side."""
        return int(vae.get("spatial_compression_ratio") or _reduction(vae, "patch_size"))

    @classmethod
    def frame_reduction(cls, vae: Mapping[str, Any]) -> int:
        """Give the frames per latent."""
        return int(vae.get("temporal_compression_ratio") or _reduction(vae, "patch_size_t"))

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments; positions are in pixels and seconds."""
        vae, (_, frames, height, width) = self.pipeline.vae.config, self.latent_shape
        scale = self.reduction(vae)
        return {
            "hidden_states": as_tokens(x),
            "timestep": time,
            "encoder_hidden_states": cond[0],
            "encoder_attention_mask": cond[1],
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": (self.frame_reduction(vae) / self.FRAME_RATE, scale, scale),
        }

    def outputs(self, predicted: torch.Tensor) -> torch.Tensor:
        """Bring what the transformer gives into the shape of latents."""
        return predicted.transpose(1, 2).unflatten(2, self.latent_shape[1:])

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: embeddings (B, tokens, dim), mask (B, tokens)."""
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return embeds, mask

    def condition_parts(self) -> list[Part]:
        """Give the shapes of the context and its mask."""
        config: Any = self.network.config
        tokens = self.max_sequence_length
        return [Part((tokens, config.caption_channels)), Part((tokens,), torch.bool)]

    def sigmas(self, steps: int, config: Mapping[str, Any]) -> np.ndarray:
        """Space noise levels equally, down to 1 / steps, before the shift."""
        return np.linspace(1.0, 1 / steps, steps)

    def to_autoencoder(self, x_1: torch.Tensor) -> torch.Tensor:
        """Bring latents to the scale of the autoencoder, whose mean and deviation are weights of it."""
        vae, shape = self.pipeline.vae, (1, -1, 1, 1, 1)
        deviation = vae.latents_std.to(x_1) / vae.config.scaling_factor
        return x_1 * deviation.view(shape) + vae.latents_mean.to(x_1).view(shape)

    def decode_latents(self, latents: torch.Tensor, vae: Any) -> torch.Tensor:
        """Decode latents; an autoencoder that takes a time is given that of data."""
        time = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        decoded: torch.Tensor = vae.decode(latents, time, return_dict=False)[0]
        return decoded


def _reduction(vae: Mapping[str, Any], patch: str) -> int:
    """Compute what an autoencoder makes smaller, by patches and by its blocks."""
    return int(vae[patch] * 2 ** sum(vae["spatio_temporal_scaling"]))
