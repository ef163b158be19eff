"""Stable Diffusion 3 and 3.5, with and without T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flowrl.models.pipeline import ATTENTION, Part, PipelineFlow
from flowrl.types import Condition

POSITIONS = 96
"""Along a side, where a transformer does not say; diffusers' own default."""


class SD3Flow(PipelineFlow):
    """A `StableDiffusion3Pipeline`."""

    PIPELINE = "StableDiffusion3Pipeline"
    TRANSFORMER = "SD3Transformer2DModel"
    ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
    WITHOUT_T5 = "text_encoder_3"
    SEQUENCE_LENGTH = 256
    MAX_SHIFT = 1.16
    lora_targets = ATTENTION

    @classmethod
    def default_sides(cls, transformer: Mapping[str, Any]) -> tuple[int, int]:
        """Give the size that the transformer was made for."""
        return int(transformer["sample_size"]), int(transformer["sample_size"])

    @classmethod
    def patch(cls, transformer: Mapping[str, Any]) -> int:
        """Give the side of a patch."""
        return int(transformer["patch_size"])

    @classmethod
    def most_patches(cls, transformer: Mapping[str, Any]) -> int | None:
        """Give the number of positions along a side."""
        return int(transformer.get("pos_embed_max_size") or POSITIONS)

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        prompt_embeds, pooled = cond
        return {
            "hidden_states": x,
            "timestep": time,
            "encoder_hidden_states": prompt_embeds,
            "pooled_projections": pooled,
        }

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

    def condition_parts(self) -> list[Part]:
        """Give the shapes of the context and the pooled embedding."""
        config: Any = self.network.config
        tokens = self.pipeline.tokenizer_max_length + self.max_sequence_length
        return [Part((tokens, config.joint_attention_dim)), Part((config.pooled_projection_dim,))]

    @property
    def sequence_length(self) -> int:
        """Number of patches of one image."""
        _, height, width = self.latent_shape
        patch = self.pipeline.transformer.config.patch_size
        return (height // patch) * (width // patch)
