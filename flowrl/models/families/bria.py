"""Bria 3.2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from flowrl.models.packing import pack, positions, unpack
from flowrl.models.pipeline import ATTENTION, Part, PipelineFlow
from flowrl.types import Condition

LATENTS = 128
"""Height and width of the latents when no resolution is asked for; the pipeline states it in code only."""


class BriaFlow(PipelineFlow):
    """A `BriaPipeline`. Embeddings beyond a prompt's end are zeros, and so are all of guidance's empty prompt."""

    PIPELINE = "BriaPipeline"
    TRANSFORMER = "BriaTransformer2DModel"
    ALWAYS_THERE = ("vae",)
    SEQUENCE_LENGTH = 128
    lora_targets = ATTENTION

    @classmethod
    def default_sides(cls, transformer: Mapping[str, Any]) -> tuple[int, int]:
        """Give the size of the pipeline's own call."""
        return LATENTS, LATENTS

    @classmethod
    def channels(cls, transformer: Mapping[str, Any]) -> int:
        """Give the channels before 2 x 2 patches are packed."""
        return int(transformer["in_channels"]) // 4

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        (embeds,) = cond
        return {
            "hidden_states": pack(x),
            "timestep": time,
            "encoder_hidden_states": embeds,
            "txt_ids": time.new_zeros(embeds.shape[1], 3),
            "img_ids": positions(self.latent_shape[1] // 2, self.latent_shape[2] // 2, x.device),
        }

    def outputs(self, predicted: torch.Tensor) -> torch.Tensor:
        """Bring what the transformer gives into the shape of latents."""
        return unpack(predicted, self.latent_shape[1] // 2, self.latent_shape[2] // 2)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: T5's embeddings (B, tokens, dim)."""
        given = {"device": self.device, "max_sequence_length": self.max_sequence_length}
        embeds, *_ = self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, **given)
        return (embeds,)

    def encode_null(self) -> Condition:
        """Give zeros."""
        return (torch.zeros_like(self.encode_prompts([""])[0]),)

    def condition_parts(self) -> list[Part]:
        """Give the shape of the embeddings."""
        config: Any = self.network.config
        return [Part((self.max_sequence_length, config.joint_attention_dim))]

    @property
    def sequence_length(self) -> int:
        """Number of tokens of one image."""
        return (self.latent_shape[1] // 2) * (self.latent_shape[2] // 2)

    def sigmas(self, steps: int, config: Mapping[str, Any]) -> np.ndarray | None:
        """Space noise levels equally before the shift: down to 1 / steps where that is dynamic, else to 0.001."""
        if config.get("use_dynamic_shifting"):
            return np.linspace(1.0, 1 / steps, steps)
        return 1 - np.linspace(0, self.timesteps - 1, steps).astype(int) / self.timesteps
