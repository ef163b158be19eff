"""FLUX.1 Kontext: FLUX.1 that sees a picture beside the prompt."""

from __future__ import annotations

from typing import Any

import torch

from flowrl.models.families.flux import FluxFlow
from flowrl.models.packing import pack
from flowrl.models.pictures import PicturesFlow
from flowrl.models.pipeline import Part
from flowrl.types import Condition


class FluxKontextFlow(PicturesFlow, FluxFlow):
    """A `FluxKontextPipeline`.

    The picture's tokens stand behind those of the latents, at the same rows and columns; the first coordinate of their
    positions is 1. Classifier-free guidance leads away from the empty prompt with the same picture.
    """

    PIPELINE = "FluxKontextPipeline"

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        *text, picture, guidance = cond
        inputs = super().inputs(x, time, (*text, guidance))
        places = inputs["img_ids"].clone()
        places[:, 0] = 1
        return {
            **inputs,
            "hidden_states": torch.cat([inputs["hidden_states"], picture], dim=1),
            "img_ids": torch.cat([inputs["img_ids"], places]),
        }

    def outputs(self, predicted: torch.Tensor) -> torch.Tensor:
        """Bring the tokens of the latents into their shape; those of the picture are dropped."""
        return super().outputs(predicted[:, : self.sequence_length])

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts as FLUX.1 does, with the pictures' tokens (B, tokens, channels) before the guidance scales."""
        *text, guidance = super().encode_prompts(prompts)
        return (*text, pack(self.encode_pictures(prompts)), guidance)

    def encode_null(self) -> Condition:
        """Encode the empty prompt, with zeros where `null_like` puts the pictures."""
        *text, guidance = super().encode_prompts([""])
        return (*text, text[0].new_zeros(1, *self.condition_parts()[-2].shape), guidance)

    def null_like(self, null: Condition, cond: Condition) -> Condition:
        """Give the empty prompt for every sample, with the sample's own picture."""
        *text, _, guidance = super().null_like(null, cond)
        return (*text, cond[-2], guidance)

    def condition_parts(self) -> list[Part]:
        """Give the shapes of FLUX.1's parts, with that of the picture's tokens before the guidance scale."""
        *text, guidance = super().condition_parts()
        config: Any = self.network.config
        return [*text, Part((self.sequence_length, config.in_channels)), guidance]

    def call_settings(self, scale: float) -> dict[str, Any]:
        """Give the arguments of the pipeline's call, which would scale samples and picture to sizes of its own."""
        _, height, width = self.sample_shape
        return {**super().call_settings(scale), "max_area": height * width, "_auto_resize": False}
