"""What the classes of Kandinsky 5.0 share: a transformer of videos, channels last, and its prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flowrl.models.one_by_one import OneByOneFlow
from flowrl.models.packing import of_length
from flowrl.models.pipeline import Part
from flowrl.types import Condition

LORA_TARGETS = ["to_query", "to_key", "to_value", "self_attention.out_layer", "cross_attention.out_layer"]
POSITIONS = 128
"""Frames, rows and columns that the transformer has positions for."""


class Kandinsky5Flow(OneByOneFlow):
    """A pipeline around the transformer of Kandinsky 5.0, which has no mask of text; subclasses say which latents."""

    TRANSFORMER = "Kandinsky5Transformer3DModel"
    ENCODERS = ("text_encoder", "text_encoder_2")
    lora_targets = LORA_TARGETS

    @classmethod
    def channels(cls, transformer: Mapping[str, Any]) -> int:
        """Give the channels of the latents."""
        return int(transformer["in_visual_dim"])

    @classmethod
    def patch(cls, transformer: Mapping[str, Any]) -> int:
        """Give the side of a patch, which is of one frame."""
        return int(transformer["patch_size"][-1])

    @classmethod
    def most_patches(cls, transformer: Mapping[str, Any]) -> int:
        """Give the number of positions along a side."""
        return POSITIONS

    @property
    def position_scales(self) -> tuple[float, float, float]:
        """What positions of frames, rows and columns are divided by."""
        return 1.0, 1.0, 1.0

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments, for latents (B, C, T', H', W')."""
        config: Any = self.network.config
        hidden, patch = x.permute(0, 2, 3, 4, 1), self.patch(config)
        if config.visual_cond:  # a picture that the video would begin with, and where it is
            hidden = torch.cat([hidden, torch.zeros_like(hidden), torch.zeros_like(hidden[..., :1])], dim=-1)
        counts = x.shape[2], x.shape[3] // patch, x.shape[4] // patch
        return {
            "hidden_states": hidden,
            "timestep": time,
            "encoder_hidden_states": cond[0],
            "pooled_projections": cond[1],
            "lengths": cond[2],
            "visual_rope_pos": [torch.arange(count, device=x.device) for count in counts],
        }

    def predict_one(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Call the network, which gives no tuple, with the places of a prompt's words."""
        embeds = inputs["encoder_hidden_states"]
        words = torch.arange(embeds.shape[1], device=embeds.device)
        given = {"text_rope_pos": words, "scale_factor": self.position_scales, "return_dict": False}
        predicted: torch.Tensor = self.network(**inputs, **given)
        return predicted

    def outputs(self, predicted: torch.Tensor) -> torch.Tensor:
        """Bring what the transformer gives into the shape of latents (B, C, T', H', W')."""
        return predicted.permute(0, 4, 1, 2, 3)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: Qwen's embeddings (B, tokens, dim), pooled CLIP (B, dim), numbers of tokens (B,)."""
        given = {"device": self.device, "max_sequence_length": self.max_sequence_length}
        encoded = [self.pipeline.encode_prompt([prompt], **given) for prompt in prompts]
        lengths = torch.tensor([len(qwen[0]) for qwen, *_ in encoded], device=self.device)
        embeds = torch.cat([of_length(qwen, self.max_sequence_length) for qwen, *_ in encoded])
        return embeds, torch.cat([pooled for _, pooled, _ in encoded]), lengths

    def condition_parts(self) -> list[Part]:
        """Give the shapes of embeddings, pooled embedding and number of tokens."""
        config: Any = self.network.config
        embeds = Part((self.max_sequence_length, config.in_text_dim))
        return [embeds, Part((config.in_text_dim2,)), Part((), torch.int64)]

    def to_autoencoder(self, x_1: torch.Tensor) -> torch.Tensor:
        """Bring latents to the scale of the autoencoder's, without its shift, as the pipeline does."""
        scaled: torch.Tensor = x_1 / self.pipeline.vae.config.scaling_factor
        return scaled
