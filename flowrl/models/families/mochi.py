"""Mochi 1, whose time runs from the noise at 0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from flowrl.models.pipeline import Part
from flowrl.models.video import VideoFlow
from flowrl.types import Condition

SLOW = 0.025
"""Noise that the first half of the steps removes, evenly; the others remove more and more."""


class MochiFlow(VideoFlow):
    """A `MochiPipeline`: its network is given 1000 t and predicts data - noise, its scheduler counts backwards."""

    PIPELINE = "MochiPipeline"
    TRANSFORMER = "MochiTransformer3DModel"
    TIME_REVERSED = PREDICTS_VELOCITY = INVERTED_LEVELS = True
    SEQUENCE_LENGTH = 256
    FRAMES, SIDES, FRAME_RATE = 19, (480, 848), 30

    @classmethod
    def reduction(cls, vae: Mapping[str, Any]) -> int:
        """Compute the pixels per latent along each side."""
        return math.prod(vae["spatial_expansions"])

    @classmethod
    def frame_reduction(cls, vae: Mapping[str, Any]) -> int:
        """Compute the frames per latent."""
        return math.prod(vae["temporal_expansions"])

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        return {
            "hidden_states": x,
            "timestep": time,
            "encoder_hidden_states": cond[0],
            "encoder_attention_mask": cond[1],
        }

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: embeddings (B, tokens, dim), mask (B, tokens)."""
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return embeds, mask

    def condition_parts(self) -> list[Part]:
        """Give the shapes of the context and its mask."""
        config: Any = self.network.config
        tokens = self.max_sequence_length
        return [Part((tokens, config.text_embed_dim)), Part((tokens,), torch.bool)]

    def sigmas(self, steps: int, config: Mapping[str, Any]) -> np.ndarray:
        """Space noise levels: a line down to 1 - `SLOW` at first, then a parabola that goes on from it."""
        half = steps // 2
        if half == 0:
            return np.ones(1)
        i, slope = np.arange(steps), SLOW / half
        rest = steps - half  # steps of the parabola, which goes on from the line
        bend = (1 - slope * steps) / rest**2
        return np.where(i < half, 1 - slope * i, 1 - slope * i - bend * (i - half) ** 2)
