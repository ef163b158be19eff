"""Ovis-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from flowrl.models.families.tokens import TokensFlow
from flowrl.models.packing import pack, positions
from flowrl.models.pipeline import ATTENTION, Part
from flowrl.types import Condition


class OvisImageFlow(TokensFlow):
    """An `OvisImagePipeline`. Places behind the end of a prompt are zeros, and take part in the attention."""

    PIPELINE = "OvisImagePipeline"
    TRANSFORMER = "OvisImageTransformer2DModel"
    SEQUENCE_LENGTH = 256
    lora_targets = ATTENTION

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments; prompts lie on the diagonal of the image's rows and columns."""
        places = torch.arange(cond[0].shape[1], device=x.device)
        return {
            "hidden_states": pack(x),
            "timestep": time,
            "encoder_hidden_states": cond[0],
            "txt_ids": F.pad(places[:, None].expand(-1, 2), (1, 0)),
            "img_ids": positions(*self.grid, x.device),
        }

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: embeddings (B, tokens, dim)."""
        embeds, *_ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return (embeds,)

    def condition_parts(self) -> list[Part]:
        """Give the shape of the context."""
        config: Any = self.network.config
        return [Part((self.max_sequence_length, config.joint_attention_dim))]
