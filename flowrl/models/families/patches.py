"""What classes have in common whose transformers say their own size and cut latents into patches themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from flowrl.models.pipeline import Part, PipelineFlow
from flowrl.types import Condition

PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
"""Projections of attention, under whichever name the attention itself goes."""


class PatchedFlow(PipelineFlow):
    """A pipeline whose transformer takes latents (B, C, H, W), for a sample size and patches of its configuration."""

    LATENTS: ClassVar[int | None] = None
    """Height and width of latents when no resolution is asked for, where the pipeline's own call does not take the
    transformer's."""
    lora_targets = PROJECTIONS

    @classmethod
    def default_sides(cls, transformer: Mapping[str, Any]) -> tuple[int, int]:
        """Give the size that the transformer was made for, or that of the pipeline's own call."""
        side = int(cls.LATENTS or transformer["sample_size"])
        return side, side

    @classmethod
    def patch(cls, transformer: Mapping[str, Any]) -> int:
        """Give the side of a patch."""
        return int(transformer["patch_size"])

    @property
    def sequence_length(self) -> int:
        """Number of patches of one image."""
        patch = self.patch(self.pipeline.transformer.config)
        return (self.latent_shape[1] // patch) * (self.latent_shape[2] // patch)


class InstructedFlow(PatchedFlow):
    """A pipeline that puts an instruction before prompts, but not before the empty prompt of guidance.

    Conditions are embeddings (B, tokens, dim), and which of them are a prompt's (B, tokens).
    """

    CAPTION: ClassVar[str]
    """What the transformer's configuration calls the width of embeddings."""

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        embeds, mask = cond
        return {
            "hidden_states": x,
            "timestep": time,
            "encoder_hidden_states": embeds,
            "encoder_attention_mask": mask,
        }

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts, after the instruction."""
        return self._encode(prompts, False, **self.instruction())[:2]

    def encode_null(self) -> Condition:
        """Encode the empty prompt, without it."""
        return self._encode([""], True, negative_prompt=[""])[2:]

    def instruction(self) -> dict[str, Any]:
        """Give the instruction as arguments of `encode_prompt`, where that does not know it already."""
        return {}

    def condition_parts(self) -> list[Part]:
        """Give the shapes of embeddings and mask."""
        length = self.max_sequence_length
        return [Part((length, int(self.network.config[self.CAPTION]))), Part((length,), torch.int64)]  # type: ignore[index]

    def _encode(self, prompts: list[str], with_null: bool, **kwargs: Any) -> Condition:
        given = {"device": self.device, "max_sequence_length": self.max_sequence_length, **kwargs}
        encoded: Condition = self.pipeline.encode_prompt(prompts, with_null, **given)
        return encoded
