"""FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flowrl.models.families.tokens import TokensFlow
from flowrl.models.packing import pack, positions
from flowrl.models.pipeline import ATTENTION, Part
from flowrl.types import Condition

LORA_TARGETS = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]


class FluxFlow(TokensFlow):
    """A `FluxPipeline`.

    FLUX.1-dev is guidance-distilled: the guidance scale is an input of the transformer, part of the condition. Where
    the transformer has no such input (FLUX.1-schnell), or `embedded_guidance` fixes it, guidance is classifier-free.
    """

    PIPELINE = "FluxPipeline"
    TRANSFORMER = "FluxTransformer2DModel"
    ENCODERS = ("text_encoder", "text_encoder_2")
    lora_targets = LORA_TARGETS

    @classmethod
    def embeds_guidance(cls, transformer: Mapping[str, Any]) -> bool:
        """Tell whether the guidance scale is an input of the transformer."""
        return bool(transformer["guidance_embeds"])

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        prompt_embeds, pooled, guidance = cond
        return {
            "hidden_states": pack(x),
            "timestep": time,
            "guidance": guidance if self.takes_guidance else None,
            "encoder_hidden_states": prompt_embeds,
            "pooled_projections": pooled,
            "txt_ids": time.new_zeros(prompt_embeds.shape[1], 3),
            "img_ids": positions(*self.grid, x.device),
        }

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: T5 embeddings (B, tokens, dim), pooled CLIP embeddings (B, dim), guidance scales (B,)."""
        prompt_embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return prompt_embeds, pooled, self.guidance_of(len(prompts))

    def condition_parts(self) -> list[Part]:
        """Give the shapes of the context, the pooled embedding, and the guidance scale."""
        config: Any = self.network.config
        shapes = (self.max_sequence_length, config.joint_attention_dim), (config.pooled_projection_dim,)
        return [*map(Part, shapes), Part((), torch.float32)]
