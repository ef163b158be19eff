"""Pictures that come with prompts: read from their files, and encoded by a pipeline's autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from flowrl.envs.prompts import PICTURE, picture_of
from flowrl.errors import ConfigError
from flowrl.models.latent_scale import from_autoencoder
from flowrl.models.pipeline import PipelineFlow
from flowrl.types import Condition, Contexts

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 2**26
"""Pixels of a picture at most, before it is resized."""


def open_picture(prompt: str, height: int, width: int) -> Image.Image:
    """Read the picture of a prompt.

    It is turned upright, as its EXIF data say, brought to RGB and resized to exactly this size by Pillow's Lanczos
    filter. Of an animation it is the first frame; transparency is dropped.

    Raises:
        ConfigError: The prompt has no picture, or its file cannot be read; names both.
    """
    with _opened(prompt) as image:
        try:
            return ImageOps.exif_transpose(image).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        except Exception as error:
            raise _unreadable(prompt, error) from error


def read_picture(prompt: str, height: int, width: int) -> torch.Tensor:
    """Read the picture of a prompt as `open_picture` does, (3, height, width) float32 in [0, 1]."""
    picture = np.array(open_picture(prompt, height, width))
    return torch.from_numpy(picture).permute(2, 0, 1).contiguous().float() / 255


def check_picture(prompt: str) -> None:
    """Look at the head of a prompt's picture.

    Raises:
        ConfigError: As `read_picture`, but for damage further on in the file.
    """
    _opened(prompt).close()


def _opened(prompt: str) -> Image.Image:
    """Open the picture of a prompt; its pixels are not decoded yet."""
    path = _place(prompt)
    try:
        if not Path(path).is_file():
            raise OSError("there is no such file")
        image = Image.open(path, formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            image.close()
            raise ValueError(f"it has {image.width} x {image.height} pixels, and may have {MOST_PIXELS:,}")
        if image.mode.startswith(("I", "F")):
            image.close()
            raise ValueError("it has more than 8 bits a channel")
    except Exception as error:
        raise _unreadable(prompt, error) from error
    return image


def _place(prompt: str) -> str:
    place = picture_of(prompt)
    if place is None:
        raise ConfigError(
            f"This flow takes a picture with each prompt, and {str(prompt)!r} has none: give it a field "
            f'"{PICTURE}" that names a file, as in {{"prompt": "make it night", "{PICTURE}": "house.png"}} '
            "(docs/prompts.md)."
        )
    return place


def _unreadable(prompt: str, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ConfigError(
        f"Cannot read the picture {_place(prompt)!r} of the prompt {str(prompt)!r}: {reason}. Give it as a whole PNG, "
        "JPEG or WebP file."
    )


class PicturesFlow(PipelineFlow):
    """A pipeline that is given a picture with each prompt, resized to the samples' height and width."""

    takes_pictures = True

    def encode(self, contexts: Contexts) -> Condition:
        """Encode prompts with their pictures; all of these are looked at first, in a dry run too."""
        for prompt in contexts:
            check_picture(prompt)
        return super().encode(contexts)

    def encode_pictures(self, prompts: list[str]) -> torch.Tensor:
        """Encode the pictures of prompts as latents (B, C, ...): the modes of the autoencoder's posteriors."""
        *_, height, width = self.sample_shape
        return self.latents_of(torch.stack([read_picture(prompt, height, width) for prompt in prompts]))

    @property
    def pictures_at_once(self) -> int:
        """Number of pictures that are encoded at once."""
        return self.decode_batch

    def for_autoencoder(self, pictures: torch.Tensor) -> torch.Tensor:
        """Bring pictures (B, 3, H, W) in [-1, 1] into the shape that the autoencoder takes."""
        return pictures

    def latents_of(self, pictures: torch.Tensor) -> torch.Tensor:
        """Encode pictures (B, 3, H, W) in [0, 1] as latents (B, C, ...)."""
        vae: Any = self.pipeline.vae
        vae.to(self.device)
        chunks = (2 * pictures - 1).split(self.pictures_at_once)
        encoded = [vae.encode(self.for_autoencoder(chunk.to(self.device, vae.dtype))) for chunk in chunks]
        modes = [z.latent_dist.mode() if hasattr(z, "latent_dist") else z.latents for z in encoded]
        return self.from_autoencoder(torch.cat(modes))

    def zeros_behind(self, text: Condition) -> Condition:
        """Put zeros behind the parts of an empty prompt, where `null_like` puts what is made of the pictures."""
        behind = self.condition_parts()[len(text) :]
        return (*text, *(text[0].new_zeros(1, *part.shape) for part in behind))

    def from_autoencoder(self, modes: torch.Tensor) -> torch.Tensor:
        """Bring latents of the autoencoder to the scale of the flow's."""
        return from_autoencoder(modes, self.pipeline.vae.config)

    def imitate_encoder(self, encoder: nn.Module, n: int) -> None:
        """Compute what the text encoder or the image encoder does with `n` prompts."""
        config: Any = encoder.config
        if hasattr(config, "image_size"):
            side, kind = config.image_size, next(encoder.parameters()).dtype
            encoder(torch.zeros(1, 3, side, side, dtype=kind, device=self.device), output_hidden_states=True)
        else:
            super().imitate_encoder(encoder, n)

    def imitate_prompts(self, prompts: list[str]) -> Condition:
        """Make meaningless embeddings; the autoencoder encodes as many pictures as it does at once."""
        self.latents_of(torch.zeros(min(len(prompts), self.pictures_at_once), *self.sample_shape[-3:]))
        return super().imitate_prompts(prompts)
