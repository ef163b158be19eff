"""HunyuanVideo 1.5 that begins with a picture."""

from __future__ import annotations

from typing import Any

import torch

from flowrl.models.families.hunyuan_video15 import HunyuanVideo15Flow
from flowrl.models.pictures import PicturesFlow, open_picture
from flowrl.models.pipeline import Part
from flowrl.types import Condition


class HunyuanVideo15ImageToVideoFlow(PicturesFlow, HunyuanVideo15Flow):
    """A `HunyuanVideo15ImageToVideoPipeline`: the picture that comes with a prompt is the video's first frame.

    The network is given its latents beside those of the first frame, under a mask, and an image encoder's embeddings.
    """

    PIPELINE = "HunyuanVideo15ImageToVideoPipeline"
    ENCODERS = ("text_encoder", "text_encoder_2", "image_encoder")
    OWN_CALL = "Its own call draws in the size of its list that is nearest to the picture's ratio."

    def __init__(self, pipeline: Any, *given: Any, **named: Any) -> None:
        super().__init__(pipeline, *given, **named)
        seen = getattr(getattr(pipeline, "image_encoder", None), "config", None)
        self.seen_tokens = (seen.image_size // seen.patch_size) ** 2 if seen else 0

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        *texts, picture, seen = cond
        after = x.shape[2] - 1
        beside = torch.cat([picture, torch.ones_like(picture[:, :1])], dim=1)
        beside = torch.cat([beside, beside.new_zeros(*beside.shape[:2], after, *beside.shape[3:])], dim=2)
        inputs = super().inputs(x, time, tuple(texts))
        return {**inputs, "hidden_states": torch.cat([x, beside], dim=1), "image_embeds": seen}

    @property
    def pictures_at_once(self) -> int:
        """One picture at once: the autoencoder's mask does not fit a batch."""
        return 1

    def for_autoencoder(self, pictures: torch.Tensor) -> torch.Tensor:
        """Give each picture as a video of one frame."""
        return pictures[:, :, None]

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts with their pictures.

        The parts of `HunyuanVideo15Flow`; latents of the pictures (B, C, 1, H', W'), their embeddings (B, tokens, dim).
        """
        seen = [self._seen(prompt) for prompt in prompts]
        return (*super().encode_prompts(prompts), self.encode_pictures(prompts), torch.cat(seen))

    def _seen(self, prompt: str) -> torch.Tensor:
        """Encode the picture of a prompt by the image encoder (1, tokens, dim)."""
        pipe, picture = self.pipeline, open_picture(prompt, *self.sample_shape[-2:])
        embeds: torch.Tensor = pipe._get_image_embeds(pipe.image_encoder, pipe.feature_extractor, picture, self.device)
        return embeds

    def encode_null(self) -> Condition:
        """Encode the empty prompt, with zeros where `null_like` puts what is made of the pictures."""
        return self.zeros_behind(super().encode_prompts([""]))

    def null_like(self, null: Condition, cond: Condition) -> Condition:
        """Give the empty prompt for every sample, with the sample's own picture."""
        return (*super().null_like(null, cond)[:-2], *cond[-2:])

    def condition_parts(self) -> list[Part]:
        """Give the shapes of both texts and their masks, of the picture's latents and of its embeddings."""
        config: Any = self.network.config
        channels, _, *sides = self.latent_shape
        seen = Part((self.seen_tokens, config.image_embed_dim))
        return [*super().condition_parts(), Part((channels, 1, *sides)), seen]
