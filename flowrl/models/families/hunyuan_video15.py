"""HunyuanVideo 1.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from flowrl.errors import ConfigError
from flowrl.models.pipeline import Part, PipelineOptions, Shapes
from flowrl.models.video import VideoFlow
from flowrl.types import Condition

GLYPHS = 256
"""Tokens of what a prompt quotes, to be written in the picture; no more than a prompt has."""


class HunyuanVideo15Flow(VideoFlow):
    """A `HunyuanVideo15Pipeline`, without a picture to begin with.

    Guidance is classifier-free by `guidance_scale`; what the pipeline's own guider says is left aside.
    """

    PIPELINE = "HunyuanVideo15Pipeline"
    TRANSFORMER = "HunyuanVideo15Transformer3DModel"
    ENCODERS: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    ALWAYS_THERE = ("vae",)
    SEQUENCE_LENGTH = 1000
    FRAMES, FRAME_RATE = 121, 24

    @classmethod
    def shapes(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], options: PipelineOptions) -> Shapes:
        """Compute shapes."""
        if transformer.get("use_meanflow"):
            raise ConfigError("This HunyuanVideo is distilled to jumps between two times (use_meanflow): no flow.")
        return super().shapes(transformer, vae, options)

    @classmethod
    def default_sides(cls, transformer: Mapping[str, Any]) -> tuple[int, int]:
        """Give the size of the pipeline's own call, by the size that the transformer was made for."""
        return (480, 848) if transformer["target_size"] <= 640 else (720, 1280)

    @classmethod
    def channels(cls, transformer: Mapping[str, Any]) -> int:
        """Give the channels of the latents."""
        return int(transformer["out_channels"])

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments: channels of a picture that is not there, and one token, which is masked."""
        config: Any = self.network.config
        embeds, mask, glyphs, glyph_mask = cond
        return {
            "hidden_states": torch.cat([x, x.new_zeros(len(x), config.in_channels - x.shape[1], *x.shape[2:])], dim=1),
            "timestep": time.to(x.dtype),  # as its own call: the type is that of the embedding
            "encoder_hidden_states": embeds,
            "encoder_attention_mask": mask,
            "encoder_hidden_states_2": glyphs,
            "encoder_attention_mask_2": glyph_mask,
            "image_embeds": x.new_zeros(len(x), 1, config.image_embed_dim),
        }

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: Qwen embeddings (B, tokens, dim) with mask, ByT5 embeddings of quotations with mask."""
        self.pipeline.tokenizer_max_length = self.max_sequence_length
        self.pipeline.tokenizer_2_max_length = min(GLYPHS, self.max_sequence_length)
        parts: Condition = self.pipeline.encode_prompt(prompts, device=self.device, batch_size=len(prompts))
        return parts

    def condition_parts(self) -> list[Part]:
        """Give the shapes of both texts and their masks."""
        config: Any = self.network.config
        tokens, glyphs = self.max_sequence_length, min(GLYPHS, self.max_sequence_length)
        texts = (tokens, config.text_embed_dim), (glyphs, config.text_embed_2_dim)
        return [part for n, dim in texts for part in (Part((n, dim)), Part((n,)))]

    def sigmas(self, steps: int, config: Mapping[str, Any]) -> np.ndarray:
        """Space noise levels equally, down to 1 / steps, before the shift."""
        return np.linspace(1.0, 0.0, steps + 1)[:-1]

    def decode_latents(self, latents: torch.Tensor, vae: Any) -> torch.Tensor:
        """Decode latents one by one: the autoencoder's mask does not fit a batch."""
        return torch.cat([super(HunyuanVideo15Flow, self).decode_latents(one, vae) for one in latents.split(1)])
