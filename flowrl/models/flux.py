"""FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from flowrl.models.pipeline import ATTENTION, PipelineFlow, Shapes, square
from flowrl.models.schedules import TIMESTEPS
from flowrl.types import Condition

LORA_TARGETS = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
LATENTS = 128
"""Height and width of the latents when no resolution is asked for; the pipeline states it in code only."""


class FluxFlow(PipelineFlow):
    """A `FluxPipeline`. Latents are (C, H, W) here; the transformer sees 2 x 2 patches of them as tokens.

    FLUX.1-dev is guidance-distilled: the guidance scale is an input of the transformer, part of the condition.
    Where the transformer has no such input (FLUX.1-schnell), guidance is classifier-free.
    """

    PIPELINE = "FluxPipeline"
    TRANSFORMER = "FluxTransformer2DModel"
    NEEDS_T5 = True
    SEQUENCE_LENGTH = 512
    MAX_SHIFT = 1.15
    lora_targets = LORA_TARGETS

    @classmethod
    def shapes(cls, transformer: Mapping[str, Any], scale: int, resolution: int | None) -> Shapes:
        """Compute the shapes of latents before they are packed: a quarter of the transformer's channels."""
        size = square(resolution, LATENTS, scale, 2)
        return Shapes((int(transformer["in_channels"]) // 4, size, size), (3, size * scale, size * scale))

    def __init__(self, pipeline: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(pipeline, *args, **kwargs)
        self.distilled_guidance = bool(pipeline.transformer.config.guidance_embeds)

    def with_guidance(self, cond: Condition, scale: float) -> Condition:
        """Put another guidance scale into a condition."""
        return (*cond[:2], torch.full_like(cond[2], scale))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Compute the velocity of the latents."""
        prompt_embeds, pooled, guidance = cond
        height, width = self.latent_shape[1] // 2, self.latent_shape[2] // 2
        noise_minus_data = self.network(
            hidden_states=pack(x_t).to(prompt_embeds.dtype),
            timestep=(1 - t) * (self.timesteps / TIMESTEPS),  # the network multiplies by 1000 itself
            guidance=guidance if self.distilled_guidance else None,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
            txt_ids=x_t.new_zeros(prompt_embeds.shape[1], 3),
            img_ids=_positions(height, width, x_t.device),
            return_dict=False,
        )[0]
        return -unpack(noise_minus_data.float(), height, width)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: T5 embeddings (B, tokens, dim), pooled CLIP embeddings (B, dim), guidance scales 1 (B,)."""
        prompt_embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return prompt_embeds, pooled, torch.ones(len(prompts), device=self.device)

    def condition_shapes(self) -> list[tuple[int, ...]]:
        """Give the shapes of the context, the pooled embedding, and the guidance scale."""
        config: Any = self.network.config
        return [(self.max_sequence_length, config.joint_attention_dim), (config.pooled_projection_dim,), ()]

    @property
    def sequence_length(self) -> int:
        """Number of tokens of one image."""
        _, height, width = self.latent_shape
        return (height // 2) * (width // 2)

    def sigmas(self, steps: int, config: Mapping[str, Any]) -> np.ndarray | None:
        """Space noise levels equally, down to 1 / steps, before the shift."""
        return None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)


def pack(x: torch.Tensor) -> torch.Tensor:
    """Pack latents (B, C, H, W) into tokens (B, H W / 4, 4 C), one per 2 x 2 patch."""
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Unpack tokens (B, height width, 4 C) into latents (B, C, 2 height, 2 width)."""
    n, _, c = tokens.shape
    patches = tokens.view(n, height, width, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(n, c // 4, 2 * height, 2 * width)


def _positions(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Give the position of each token (height width, 3): 0, row, column."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    grid = torch.cartesian_prod(rows, columns).float()
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)
