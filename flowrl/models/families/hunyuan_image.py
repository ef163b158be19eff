"""HunyuanImage 2.1."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from flowrl.errors import ConfigError
from flowrl.models.families.patches import PatchedFlow
from flowrl.models.pipeline import ATTENTION, Part, PipelineOptions, Shapes
from flowrl.types import Condition

GLYPHS = 128
"""Tokens of the text that a prompt puts in quotation marks."""


class HunyuanImageFlow(PatchedFlow):
    """A `HunyuanImagePipeline`. Guidance is classifier-free, by `guidance_scale`, instead of by the pipeline's guiders.

    Those change over the steps of a call, from classifier-free to projected guidance with a momentum: a field of
    velocities cannot have that.
    """

    PIPELINE = "HunyuanImagePipeline"
    TRANSFORMER = "HunyuanImageTransformer2DModel"
    ENCODERS = ("text_encoder", "text_encoder_2")
    SEQUENCE_LENGTH = 1000
    LATENTS = 64
    lora_targets = ATTENTION

    @classmethod
    def shapes(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], options: PipelineOptions) -> Shapes:
        """Compute shapes."""
        if transformer.get("use_meanflow"):
            raise ConfigError("This HunyuanImage is distilled to jumps between two times (use_meanflow): no flow.")
        return super().shapes(transformer, vae, options)

    @classmethod
    def reduction(cls, vae: Mapping[str, Any]) -> int:
        """Give the pixels per latent along each side."""
        return int(vae["spatial_compression_ratio"])

    @classmethod
    def patch(cls, transformer: Mapping[str, Any]) -> int:
        """Give the side of a patch."""
        return int(transformer["patch_size"][-1])

    @classmethod
    def embeds_guidance(cls, transformer: Mapping[str, Any]) -> bool:
        """Tell whether the guidance scale is an input of the transformer."""
        return bool(transformer.get("guidance_embeds"))

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        embeds, mask, glyphs, glyph_mask, guidance = cond
        return {
            "hidden_states": x,
            "timestep": time.to(x.dtype),  # as its own call: the type is that of the embedding
            "guidance": 1000 * guidance if self.takes_guidance else None,
            "encoder_hidden_states": embeds,
            "encoder_attention_mask": mask,
            "encoder_hidden_states_2": glyphs,
            "encoder_attention_mask_2": glyph_mask,
        }

    def checkpoint_gradients(self) -> None:
        """Compute activations again, by a function that takes what this transformer gives by name."""
        self.network.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))  # type: ignore[operator]

    def tokenizers(self) -> list[tuple[str, Any, int]]:
        """Give Qwen's only: ByT5 is given what a prompt quotes."""
        return super().tokenizers()[:1]

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: embeddings of Qwen and of ByT5, each with a mask (B, tokens), and guidance scales (B,)."""
        self.pipeline.tokenizer_max_length = self.max_sequence_length
        encoded = self.pipeline.encode_prompt(prompts, self.device, len(prompts))
        return *encoded, self.guidance_of(len(prompts))

    def condition_parts(self) -> list[Part]:
        """Give the shapes of embeddings, masks and the guidance scale."""
        config: Any = self.network.config
        parts = []
        for length, width in (self.max_sequence_length, config.text_embed_dim), (GLYPHS, config.text_embed_2_dim):
            parts += [Part((length, width)), Part((length,), torch.int64)]
        return [*parts, Part((), torch.float32)]

    def sigmas(self, steps: int, config: Mapping[str, Any]) -> np.ndarray | None:
        """Space noise levels equally before the shift."""
        return np.linspace(1.0, 0.0, steps + 1)[:-1]
