"""PRX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from flowrl.models.families.patches import PatchedFlow
from flowrl.models.pipeline import Part, PipelineOptions, Shapes
from flowrl.models.text_encoders import cleaned_by_ftfy
from flowrl.types import Condition

SIDE = 512
"""Pixels when no resolution is asked for, whatever the autoencoder."""
LORA_TARGETS = ["attention.img_qkv_proj", "attention.txt_kv_proj", "attention.to_out.0"]


class PRXFlow(PatchedFlow):
    """A `PRXPipeline`, of latents. diffusers has no loader for its adapters: they are peft's, under usual names."""

    PIPELINE = "PRXPipeline"
    TRANSFORMER = "PRXTransformer2DModel"
    SEQUENCE_LENGTH = 256
    TIME_SCALE = 1.0
    lora_targets = LORA_TARGETS

    @classmethod
    def shapes(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], options: PipelineOptions) -> Shapes:
        """Compute shapes."""
        return super().shapes(transformer, vae, replace(options, resolution=options.resolution or SIDE))

    @classmethod
    def default_sides(cls, transformer: Mapping[str, Any]) -> tuple[int, int]:
        """Give none: there is always a resolution."""
        return 0, 0

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        embeds, mask = cond
        return {"hidden_states": x, "timestep": time, "encoder_hidden_states": embeds, "attention_mask": mask}

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: embeddings (B, tokens, dim), and which of them are a prompt's (B, tokens)."""
        given = {"do_classifier_free_guidance": False, "tokenizer_max_length": self.max_sequence_length}
        with cleaned_by_ftfy(self.PIPELINE):
            embeds, mask, *_ = self.pipeline.encode_prompt(prompts, self.device, **given)
        return embeds, mask

    def condition_parts(self) -> list[Part]:
        """Give the shapes of embeddings and mask."""
        config: Any = self.network.config
        length = self.max_sequence_length
        return [Part((length, config.context_in_dim)), Part((length,), torch.bool)]
