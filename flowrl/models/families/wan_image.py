"""Wan 2.1 and 2.2 that begin a video with a picture, which the network is given beside the latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flowrl.errors import ConfigError
from flowrl.models.families.wan import WanFlow
from flowrl.models.families.wan_first_frame import WanFirstFrameFlow
from flowrl.models.pictures import PicturesFlow, open_picture
from flowrl.models.pipeline import Part, PipelineFlow, PipelineOptions, Shapes
from flowrl.models.text_encoders import cleaned_by_ftfy
from flowrl.types import Condition


class WanImageToVideoFlow(PicturesFlow, WanFlow):
    """A `WanImageToVideoPipeline`: the picture that comes with a prompt is the video's first frame.

    The network is given it beside the latents, as those of a video that is grey afterwards, under a mask of the first
    frame; that of Wan 2.1 is also given what an image encoder makes of it.
    """

    PIPELINE = "WanImageToVideoPipeline"
    ENCODERS = ("text_encoder", "image_encoder")

    def __init__(self, pipeline: Any, *given: Any, **named: Any) -> None:
        super().__init__(pipeline, *given, **named)
        seen = getattr(getattr(pipeline, "image_encoder", None), "config", None)
        self.seen_shape = ((seen.image_size // seen.patch_size) ** 2 + 1, seen.hidden_size) if seen else ()

    @classmethod
    def form(cls, index: Mapping[str, Any]) -> type[PipelineFlow]:
        """Give this class, or that of a picture in the place of the first latents."""
        return WanFirstFrameFlow if index.get("expand_timesteps") else cls

    @classmethod
    def shapes(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], options: PipelineOptions) -> Shapes:
        """Compute shapes."""
        if transformer.get("pos_embed_seq_len"):
            raise ConfigError(f"This {cls.PIPELINE} goes from a first picture to a last one; a prompt has one.")
        return super().shapes(transformer, vae, options)

    @classmethod
    def channels(cls, transformer: Mapping[str, Any]) -> int:
        """Give the channels of the latents, without those of the picture beside them."""
        return int(transformer["out_channels"])

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        text, beside, *seen = cond
        inputs = super().inputs(torch.cat([x, beside], dim=1), time, (text,))
        return {**inputs, "encoder_hidden_states_image": seen[0] if seen else None}

    @property
    def pictures_at_once(self) -> int:
        """Number of videos that are encoded at once; `decode_batch` counts frames."""
        return max(1, self.decode_batch // self.sample_shape[0])

    def for_autoencoder(self, pictures: torch.Tensor) -> torch.Tensor:
        """Give videos (B, 3, T, H, W) that are the picture, then grey."""
        grey = pictures.new_zeros(1, 1, 1, 1, 1).expand(len(pictures), 3, self.sample_shape[0] - 1, *pictures.shape[2:])
        return torch.cat([pictures[:, :, None], grey], dim=2)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts with their pictures.

        Embeddings (B, tokens, dim); what stands beside the latents (B, channels, T', H', W'), the mask first; of Wan
        2.1 the picture's own embeddings (B, tokens, dim).
        """
        pictures = self.encode_pictures(prompts)
        mask = pictures.new_zeros(len(prompts), self.frame_reduction(self.pipeline.vae.config), *pictures.shape[2:])
        mask[:, :, 0] = 1
        given = (*self._text(prompts), torch.cat([mask, pictures], dim=1))
        return (*given, torch.cat([self._seen(prompt) for prompt in prompts])) if self.sees else given

    def _text(self, prompts: list[str]) -> Condition:
        with cleaned_by_ftfy(self.PIPELINE):
            return super().encode_prompts(prompts)

    @property
    def sees(self) -> bool:
        """Whether the network is given what an image encoder makes of the picture."""
        config: Any = self.network.config
        return config.image_dim is not None

    def _seen(self, prompt: str) -> torch.Tensor:
        """Encode the picture of a prompt by the image encoder (1, tokens, dim)."""
        embeds: torch.Tensor = self.pipeline.encode_image(open_picture(prompt, *self.sample_shape[-2:]), self.device)
        return embeds

    def encode_null(self) -> Condition:
        """Encode the empty prompt, with zeros where `null_like` puts what is made of the pictures."""
        return self.zeros_behind(self._text([""]))

    def null_like(self, null: Condition, cond: Condition) -> Condition:
        """Give the empty prompt for every sample, with the sample's own picture."""
        return (super().null_like(null, cond)[0], *cond[1:])

    def condition_parts(self) -> list[Part]:
        """Give the shapes of the context, of what stands beside the latents, and of the picture's embeddings."""
        config: Any = self.network.config
        _, *sides = self.latent_shape
        parts = [*super().condition_parts(), Part((config.in_channels - config.out_channels, *sides))]
        return [*parts, Part(self.seen_shape)] if self.sees else parts
