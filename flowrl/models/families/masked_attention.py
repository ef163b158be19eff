"""Attention of CogView4 and GLM-Image that leaves out what pads the text.

diffusers' own adds 1 to the logits of the rest instead.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.nn import functional as F


class MaskedAttention:
    """Attention processor that takes a mask of text tokens (B, tokens); without it, what diffusers' own computes."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        kv_cache: None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend from text and image to both; positions are the image's only, and no images were cached."""
        from diffusers.models.embeddings import apply_rotary_emb

        words, patches = encoder_hidden_states.shape[1], hidden_states.shape[1]
        both = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            project(both).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )

        def placed(x: torch.Tensor) -> torch.Tensor:
            x = x.to(both.dtype)
            if image_rotary_emb is None:
                return x
            image: Any = apply_rotary_emb(x[:, :, words:], cast(Any, image_rotary_emb), use_real_unbind_dim=-2)
            return torch.cat([x[:, :, :words], image], dim=2)

        mask = None if attention_mask is None else F.pad(attention_mask.bool(), (0, patches), value=True)[:, None, None]
        attended = F.scaled_dot_product_attention(
            placed(attn.norm_q(query)), placed(attn.norm_k(key)), value, attn_mask=mask
        )
        out = attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))
        return out[:, words:], out[:, :words]
