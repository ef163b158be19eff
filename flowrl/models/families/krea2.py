"""Krea 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from flowrl.functional.guidance import linear
from flowrl.models.families.tokens import OneFrameFlow
from flowrl.models.packing import pack, positions
from flowrl.models.pipeline import Part
from flowrl.types import Condition

LORA_TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_gate"]
MOST_TOKENS = 6400
"""The pipeline's own default of `max_image_seq_len` in its schedule."""


class Krea2Flow(OneFrameFlow):
    """A `Krea2Pipeline`. The condition holds several layers of the text encoder for each token.

    `guidance_scale` counts as in its own call, whose guided velocity is `v + scale (v - v_null)` and whose scale
    without guidance is 0; here 1 leaves guidance out too, as everywhere. Of a pipeline that says `is_distilled` the
    schedule does not depend on the resolution; it wants no guidance, but takes any.
    """

    PIPELINE = "Krea2Pipeline"
    TRANSFORMER = "Krea2Transformer2DModel"
    UNGUIDED = 0.0
    lora_targets = LORA_TARGETS

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments; prompts lie where rows and columns begin."""
        prompt_embeds, mask = cond
        return {
            "hidden_states": pack(x),
            "timestep": time,
            "encoder_hidden_states": prompt_embeds,
            "encoder_attention_mask": mask,
            "position_ids": F.pad(positions(*self.grid, x.device), (0, 0, prompt_embeds.shape[1], 0)),
        }

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: embeddings (B, tokens, layers, dim), and which tokens are no padding (B, tokens)."""
        embeds, mask = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return embeds, mask

    def template_tokens(self) -> int:
        """Count what follows the prompt, behind its padding."""
        return int(self.pipeline.prompt_template_encode_num_suffix_tokens)

    def condition_parts(self) -> list[Part]:
        """Give the shapes of the context and of its mask."""
        config: Any = self.network.config
        tokens = self.max_sequence_length
        return [Part((tokens, config.num_text_layers, config.text_hidden_dim)), Part((tokens,), torch.bool)]

    def shift(self, steps: int, config: Mapping[str, Any]) -> float:
        """Compute the shift, which is fixed where the pipeline is distilled."""
        if self.pipeline.config.is_distilled:
            return self.MAX_SHIFT
        return super().shift(steps, {"max_image_seq_len": MOST_TOKENS, **config})

    def guide(self, v: torch.Tensor, v_null: torch.Tensor, scale: float) -> torch.Tensor:
        """Guide along the line through both velocities, in the pipeline's own measure."""
        return linear(v, v_null, 1 + scale)
