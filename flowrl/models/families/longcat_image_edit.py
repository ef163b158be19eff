"""LongCat-Image-Edit: LongCat-Image that sees a picture beside the prompt."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import nn

from flowrl.errors import ConfigError
from flowrl.functional.guidance import linear
from flowrl.models.families.longcat_image import LongCatImageFlow
from flowrl.models.families.qwen_image_edit import LEAST_SEEN, SEEN
from flowrl.models.packing import pack
from flowrl.models.pictures import PicturesFlow, open_picture
from flowrl.models.pipeline import Part
from flowrl.models.text_encoders import check_length
from flowrl.types import Condition


class LongCatImageEditFlow(PicturesFlow, LongCatImageFlow):
    """A `LongCatImageEditPipeline`: a picture comes with each prompt.

    Its tokens stand behind those of the latents, in a plane of their own, and the text encoder sees it at half its
    sides before the prompt. Guidance leads away from the empty prompt with the same picture, and is not bounded.
    """

    PIPELINE = "LongCatImageEditPipeline"
    OWN_CALL = (
        "Its own call brings the picture to an area of one megapixel, and with transformers 5 its text encoder does "
        "not know the rows and columns of the picture."
    )

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        inputs = super().inputs(x, time, cond)
        places = inputs["img_ids"] + torch.tensor([1.0, 0.0, 0.0], device=x.device)
        return {
            **inputs,
            "hidden_states": torch.cat([inputs["hidden_states"], cond[-1]], dim=1),
            "img_ids": torch.cat([inputs["img_ids"], places]),
        }

    def outputs(self, predicted: torch.Tensor) -> torch.Tensor:
        """Bring the tokens of the latents into their shape; those of the picture are dropped."""
        return super().outputs(predicted[:, : self.sequence_length])

    def tokenizers(self) -> list[tuple[str, Any, int]]:
        """Give none: prompts are not cut."""
        return []

    @property
    def seen_tokens(self) -> int:
        """Number of tokens of the picture in the text encoder, and of the marks around them."""
        sides = [side // 2 for side in self.sample_shape[1:]]
        rows, columns = (round(side / SEEN) for side in sides)
        if rows * columns < LEAST_SEEN:
            scale = math.sqrt(LEAST_SEEN / math.prod(sides))
            rows, columns = (math.ceil(side * scale) for side in sides)
        return rows * columns + 2

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts with their pictures.

        Embeddings (B, tokens, dim); those of the empty prompt with the same picture; the picture's tokens (B, tokens,
        channels).
        """
        self.pipeline.tokenizer_max_length = self.max_sequence_length
        handle = self.pipeline.text_encoder.register_forward_pre_hook(with_places, with_kwargs=True)
        try:
            texts, empty = zip(*((self._embeds(prompt, prompt), self._embeds("", prompt)) for prompt in prompts))
        finally:
            handle.remove()
        return torch.cat(texts), torch.cat(empty), pack(self.encode_pictures(prompts))

    def _embeds(self, text: str, prompt: str) -> torch.Tensor:
        """Encode a text and the picture of a prompt (1, tokens, dim)."""
        pipe, (_, height, width) = self.pipeline, self.sample_shape
        parts = sys.modules[type(pipe).__module__].split_quotation(text)
        pieces = [
            piece for part, is_quoted in parts for piece in (part if is_quoted else [part])
        ]  # signs of quotations
        tokens = sum(len(pipe.tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces)
        check_length(f"The prompt {text[:100]!r}", tokens, self.max_sequence_length)
        picture = pipe.image_processor.resize(open_picture(prompt, height, width), height // 2, width // 2)
        embeds: torch.Tensor = pipe.encode_prompt([text], picture)[0]
        if embeds.shape[1] != self.seen_tokens + self.max_sequence_length:
            raise ConfigError(f"The text encoder sees pictures of {height}x{width} smaller than they are: take others.")
        return embeds

    def encode_null(self) -> Condition:
        """Give nothing but shapes: `null_like` takes the empty prompt from each sample's condition."""
        return self._imitated_parts(1)

    def null_like(self, null: Condition, cond: Condition) -> Condition:
        """Give the empty prompt for every sample, with the sample's own picture."""
        super().null_like(null, cond)  # looks at the shapes
        return (cond[1], *cond[1:])

    def condition_parts(self) -> list[Part]:
        """Give the shapes of the context, twice, and of the picture's tokens."""
        config: Any = self.network.config
        text = Part((self.seen_tokens + self.max_sequence_length, config.joint_attention_dim))
        return [text, text, Part((self.sequence_length, config.in_channels))]

    def guide(self, v: torch.Tensor, v_null: torch.Tensor, scale: float) -> torch.Tensor:
        """Guide along the line through both velocities."""
        return linear(v, v_null, scale)


def with_places(encoder: nn.Module, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Tell a text encoder which tokens are a picture's, so that it knows their rows and columns."""
    config: Any = encoder.config
    return given, {**named, "mm_token_type_ids": (named["input_ids"] == config.image_token_id).int()}
