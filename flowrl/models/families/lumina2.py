"""Lumina-Image 2.0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from flowrl.functional.guidance import linear
from flowrl.models.families.patches import InstructedFlow


class Lumina2Flow(InstructedFlow):
    """A `Lumina2Pipeline`. Its instruction counts as part of a prompt's tokens."""

    PIPELINE = "Lumina2Pipeline"
    TRANSFORMER = "Lumina2Transformer2DModel"
    CAPTION = "cap_feat_dim"
    SEQUENCE_LENGTH = 256
    TIME_SCALE = 1.0
    TIME_REVERSED = True
    PREDICTS_VELOCITY = True

    @classmethod
    def most_patches(cls, transformer: Mapping[str, Any]) -> int | None:
        """Give the number of positions along a side."""
        return int(min(transformer["axes_lens"][1:]))

    def guide(self, v: torch.Tensor, v_null: torch.Tensor, scale: float) -> torch.Tensor:
        """Guide velocities, and bring each row of latents back to its norm without guidance, as the pipeline does."""
        guided = linear(v, v_null, scale)
        return guided * (v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def tokenizers(self) -> list[tuple[str, Any, int]]:
        """Name of the text encoder, its tokenizer, and how many tokens of a prompt the instruction leaves."""
        return [
            (name, tokenizer, most - len(tokenizer(self.pipeline.system_prompt)["input_ids"]))
            for name, tokenizer, most in super().tokenizers()
        ]

    @property
    def sequence_length(self) -> int:
        """Number of channels: the pipeline shifts its schedule by that, at any resolution."""
        return self.latent_shape[0]

    def sigmas(self, steps: int, config: Mapping[str, Any]) -> np.ndarray | None:
        """Space noise levels equally, down to 1 / steps, before the shift."""
        return np.linspace(1.0, 1 / steps, steps)
