"""AuraFlow."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch

from flowrl.models.families.patches import PatchedFlow
from flowrl.models.pipeline import ATTENTION, Part
from flowrl.types import Condition


class AuraFlowFlow(PatchedFlow):
    """An `AuraFlowPipeline`. Embeddings beyond a prompt's end are zeros, which the transformer sees."""

    PIPELINE = "AuraFlowPipeline"
    TRANSFORMER = "AuraFlowTransformer2DModel"
    LATENTS = 128
    SEQUENCE_LENGTH = 256
    TIME_SCALE = 1.0
    lora_targets = ATTENTION

    @classmethod
    def most_patches(cls, transformer: Mapping[str, Any]) -> int | None:
        """Give the number of positions along a side."""
        return isqrt(int(transformer["pos_embed_max_size"]))

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        return {"hidden_states": x, "timestep": time, "encoder_hidden_states": cond[0]}

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: T5's embeddings (B, tokens, dim)."""
        embeds, *_ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return (embeds,)

    def condition_parts(self) -> list[Part]:
        """Give the shape of the embeddings."""
        config: Any = self.network.config
        return [Part((self.max_sequence_length, config.joint_attention_dim))]
