"""HunyuanVideo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from flowrl.models.pipeline import Part
from flowrl.models.video import VideoFlow
from flowrl.types import Condition


class HunyuanVideoFlow(VideoFlow):
    """A `HunyuanVideoPipeline`, guidance-distilled: the scale is an input of the transformer, times 1000.

    With `embedded_guidance` that is fixed, and guidance is classifier-free beside it.
    """

    PIPELINE = "HunyuanVideoPipeline"
    TRANSFORMER = "HunyuanVideoTransformer3DModel"
    ENCODERS = ("text_encoder", "text_encoder_2")
    SEQUENCE_LENGTH = 256
    FRAMES, SIDES, FRAME_RATE = 129, (720, 1280), 24

    @classmethod
    def embeds_guidance(cls, transformer: Mapping[str, Any]) -> bool:
        """Tell whether the guidance scale is an input of the transformer."""
        return bool(transformer["guidance_embeds"])

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        return {
            "hidden_states": x,
            "timestep": time,
            "encoder_hidden_states": cond[0],
            "pooled_projections": cond[1],
            "encoder_attention_mask": cond[2],
            "guidance": 1000 * cond[3].to(x.dtype) if self.takes_guidance else None,
        }

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: Llama embeddings (B, tokens, dim), pooled CLIP embeddings (B, dim), mask, guidance scales."""
        embeds, pooled, mask = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return embeds, pooled, mask, self.guidance_of(len(prompts))

    def condition_parts(self) -> list[Part]:
        """Give the shapes of the context, the pooled embedding, the mask, and the guidance scale."""
        config: Any = self.network.config
        tokens = self.max_sequence_length
        texts = [Part((tokens, config.text_embed_dim)), Part((config.pooled_projection_dim,))]
        return [*texts, Part((tokens,), torch.int64), Part((), torch.float32)]

    def sigmas(self, steps: int, config: Mapping[str, Any]) -> np.ndarray:
        """Space noise levels equally, down to 1 / steps, before the shift."""
        return np.linspace(1.0, 0.0, steps + 1)[:-1]
