"""Stable Diffusion 3 and 3.5, with and without T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flowrl.models.pipeline import ATTENTION, PipelineFlow, Shapes, square
from flowrl.types import Condition

POSITIONS = 96
"""Along a side, where a transformer does not say; diffusers' own default."""


class SD3Flow(PipelineFlow):
    """A `StableDiffusion3Pipeline`."""

    PIPELINE = "StableDiffusion3Pipeline"
    TRANSFORMER = "SD3Transformer2DModel"
    NEEDS_T5 = False
    SEQUENCE_LENGTH = 256
    MAX_SHIFT = 1.16
    lora_targets = ATTENTION

    @classmethod
    def shapes(cls, transformer: Mapping[str, Any], scale: int, resolution: int | None) -> Shapes:
        """Compute the shapes of latents, as the transformer takes them."""
        most = int(transformer.get("pos_embed_max_size") or POSITIONS)
        size = square(resolution, int(transformer["sample_size"]), scale, int(transformer["patch_size"]), most)
        return Shapes((int(transformer["in_channels"]), size, size), (3, size * scale, size * scale))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Compute the velocity of the latents."""
        prompt_embeds, pooled = cond
        noise_minus_data = self.network(
            hidden_states=x_t.to(prompt_embeds.dtype),
            timestep=self.timesteps * (1 - t),
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return -noise_minus_data.float()

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: embeddings (B, tokens, dim), pooled embeddings (B, dim); zeros stand in for an absent T5."""
        prompt_embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return prompt_embeds, pooled

    def condition_shapes(self) -> list[tuple[int, ...]]:
        """Give the shapes of the context and the pooled embedding."""
        config: Any = self.network.config
        tokens = self.pipeline.tokenizer_max_length + self.max_sequence_length
        return [(tokens, config.joint_attention_dim), (config.pooled_projection_dim,)]

    @property
    def sequence_length(self) -> int:
        """Number of patches of one image."""
        _, height, width = self.latent_shape
        patch = self.pipeline.transformer.config.patch_size
        return (height // patch) * (width // patch)
