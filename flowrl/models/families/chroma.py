"""Chroma."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from flowrl.models.compiling import repeated_blocks
from flowrl.models.families.tokens import TokensFlow
from flowrl.models.packing import pack, positions
from flowrl.models.pipeline import ATTENTION, Part
from flowrl.types import Condition


class ChromaFlow(TokensFlow):
    """A `ChromaPipeline`. The mask of a prompt is added to the attention's logits, of the prompt and its end 1."""

    PIPELINE = "ChromaPipeline"
    TRANSFORMER = "ChromaTransformer2DModel"
    lora_targets = ATTENTION

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        prompt_embeds, mask = cond
        return {
            "hidden_states": pack(x),
            "timestep": time,
            "encoder_hidden_states": prompt_embeds,
            "txt_ids": time.new_zeros(prompt_embeds.shape[1], 3),
            "img_ids": positions(*self.grid, x.device),
            "attention_mask": torch.cat([mask, mask.new_ones(len(x), self.sequence_length)], dim=1),
        }

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: T5 embeddings (B, tokens, dim), and which tokens are the prompt's or its end (B, tokens)."""
        embeds, _, mask, *_ = self.pipeline.encode_prompt(
            prompts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return embeds, mask

    def condition_parts(self) -> list[Part]:
        """Give the shapes of the context and of its mask."""
        config: Any = self.network.config
        return [Part((self.max_sequence_length, config.joint_attention_dim)), Part((self.max_sequence_length,))]

    def checkpoint_gradients(self) -> None:
        """Compute activations of each block again in the backward pass; diffusers' own way leaves out the mask."""
        for block in repeated_blocks(self.network):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
