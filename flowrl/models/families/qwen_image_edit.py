"""Qwen-Image-Edit: Qwen-Image that sees a picture beside the prompt."""

from __future__ import annotations

import math
from typing import Any

import torch

from flowrl.models.families.qwen_image import QwenImageFlow
from flowrl.models.packing import pack, with_mask
from flowrl.models.pictures import PicturesFlow, open_picture
from flowrl.models.pipeline import Part
from flowrl.models.text_encoders import check_length
from flowrl.types import Condition

SEEN = 28
"""Pixels along each side of a picture that are one token of the text encoder."""
LEAST_SEEN = 4
"""Tokens that the smallest picture is brought to."""
AREA = 384 * 384
"""Pixels of the picture that the text encoder of `QwenImageEditPlusPipeline` is given."""


class QwenImageEditFlow(PicturesFlow, QwenImageFlow):
    """A `QwenImageEditPipeline`; `guidance_scale` is its `true_cfg_scale`.

    The picture's tokens stand behind those of the latents, and the text encoder sees the picture before the prompt.
    Classifier-free guidance leads away from the empty prompt with the same picture, which is a part of the condition.
    """

    PIPELINE = "QwenImageEditPipeline"
    SEQUENCE_LENGTH = 256
    OWN_CALL = (
        "Its own call brings the picture to an area of one megapixel, and with transformers 5 its text encoder does "
        "not know the rows and columns of the picture."
    )
    LABEL = ""
    """What stands before a prompt."""

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        inputs = super().inputs(x, time, cond[:2])
        tokens = torch.cat([inputs["hidden_states"], cond[-1]], dim=1)
        return {**inputs, "hidden_states": tokens, "img_shapes": [[(1, *self.grid)] * 2] * len(x)}

    def outputs(self, predicted: torch.Tensor) -> torch.Tensor:
        """Bring the tokens of the latents into their shape; those of the picture are dropped."""
        return super().outputs(predicted[:, : self.sequence_length])

    def for_autoencoder(self, pictures: torch.Tensor) -> torch.Tensor:
        """Give each picture as a video of one frame."""
        return pictures[:, :, None]

    def tokenizers(self) -> list[tuple[str, Any, int]]:
        """Give none: prompts are not cut."""
        return []

    def seen_sides(self) -> tuple[int, int]:
        """Give height and width of the picture that the text encoder is given."""
        _, height, width = self.sample_shape
        return height, width

    @property
    def seen_tokens(self) -> int:
        """Room for the tokens of the picture that the text encoder is given."""
        height, width = self.seen_sides()
        return max(LEAST_SEEN, math.ceil(height / SEEN) * math.ceil(width / SEEN))

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts with their pictures.

        Embeddings (B, tokens, dim) and which tokens there are (B, tokens); both again of the empty prompt with the
        same picture; the picture's tokens (B, tokens, channels).
        """
        room, texts, empty = self.seen_tokens, [], []
        for prompt in prompts:
            picture = open_picture(prompt, *self.seen_sides())
            texts.append(self._embeds(prompt, picture))
            empty.append(self._embeds("", picture))
            check_length(f"The prompt {prompt[:100]!r}", texts[-1].shape[1] - room, self.max_sequence_length)
        length = room + self.max_sequence_length
        return *with_mask(texts, length), *with_mask(empty, length), pack(self.encode_pictures(prompts)[:, :, 0])

    def _embeds(self, prompt: str, picture: Any) -> torch.Tensor:
        """Encode a prompt and a picture (1, tokens, dim), whose tokens the text encoder knows by rows and columns."""
        text = self.pipeline.prompt_template_encode.format(self.LABEL + prompt)
        given = self.pipeline.processor(text=[text], images=[picture], return_tensors="pt").to(self.device)
        hidden = self.pipeline.text_encoder(**given, output_hidden_states=True).hidden_states[-1]
        embeds: torch.Tensor = hidden[:, self.pipeline.prompt_template_encode_start_idx :]
        return embeds

    def encode_null(self) -> Condition:
        """Give nothing but shapes: `null_like` takes the empty prompt from each sample's condition."""
        return self._imitated_parts(1)

    def null_like(self, null: Condition, cond: Condition) -> Condition:
        """Give the empty prompt for every sample, with the sample's own picture."""
        super().null_like(null, cond)  # looks at the shapes
        return (*cond[2:4], *cond[2:])

    def condition_parts(self) -> list[Part]:
        """Give the shapes of the context and its mask, twice, and of the picture's tokens."""
        config: Any = self.network.config
        tokens = self.seen_tokens + self.max_sequence_length
        text = [Part((tokens, config.joint_attention_dim)), Part((tokens,), torch.bool)]
        return [*text, *text, Part((self.sequence_length, config.in_channels))]


class QwenImageEditPlusFlow(QwenImageEditFlow):
    """A `QwenImageEditPlusPipeline` (Qwen-Image-Edit-2509 and later), with one picture a prompt.

    Its text encoder is given a picture of a fixed area, under a label.
    """

    PIPELINE = "QwenImageEditPlusPipeline"
    LABEL = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"

    def seen_sides(self) -> tuple[int, int]:
        """Give height and width of the picture that the text encoder is given: of the samples' ratio."""
        _, height, width = self.sample_shape
        broad = math.sqrt(AREA * width / height)
        return round(broad * height / width / 32) * 32, round(broad / 32) * 32
