"""LongCat-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from flowrl.functional.guidance import linear
from flowrl.models.families.tokens import TokensFlow
from flowrl.models.packing import pack, positions
from flowrl.models.pipeline import ATTENTION, Part
from flowrl.types import Condition


class LongCatImageFlow(TokensFlow):
    """A `LongCatImagePipeline`. Prompts are taken as they are: its own call has its text encoder rewrite them first.

    Guided velocities have, token by token, at most the norm of the unguided ones. Places behind the end of a prompt
    take part in the attention.
    """

    PIPELINE = "LongCatImagePipeline"
    TRANSFORMER = "LongCatImageTransformer2DModel"
    lora_targets = ATTENTION

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments; the image's rows and columns begin where the prompt's places end."""
        places = torch.arange(cond[0].shape[1], device=x.device)
        start = torch.tensor([1.0, len(places), len(places)], device=x.device)
        return {
            "hidden_states": pack(x),
            "timestep": time,
            "encoder_hidden_states": cond[0],
            "txt_ids": F.pad(places[:, None].expand(-1, 2), (1, 0)),
            "img_ids": positions(*self.grid, x.device) + start,
        }

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: embeddings (B, tokens, dim)."""
        self.pipeline.tokenizer_max_length = self.max_sequence_length
        return (self.pipeline.encode_prompt(prompts)[0],)

    def condition_parts(self) -> list[Part]:
        """Give the shape of the context."""
        config: Any = self.network.config
        return [Part((self.max_sequence_length, config.joint_attention_dim))]

    def guide(self, v: torch.Tensor, v_null: torch.Tensor, scale: float) -> torch.Tensor:
        """Guide along the line through both velocities, where that does not raise the norm of a token."""
        guided = linear(v, v_null, scale)
        norm, guided_norm = (pack(x).norm(dim=-1, keepdim=True) for x in (v, guided))
        return self.outputs(pack(guided) * (norm / (guided_norm + 1e-8)).clamp(max=1))
