"""JPEG compressibility (Black et al. 2023, DDPO): a reward without a gradient."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image

from flowrl.envs.rewards.catalogue import register_reward
from flowrl.envs.rewards.ranges import UNIT
from flowrl.errors import ConfigError
from flowrl.types import RewardOutput


def jpeg_kilobytes(images: torch.Tensor, quality: int = 95) -> torch.Tensor:
    """Measure each image (B, 3, H, W) in [0, 1] as a JPEG file, in kB (1000 bytes): (B,) float32 on the CPU."""
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def size(array: object) -> float:
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, format="JPEG", quality=quality)  # type: ignore[arg-type]
        return stream.tell() / 1000

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow encodes without holding the interpreter lock
        return torch.tensor(list(pool.map(size, pixels)), dtype=torch.float32)


@register_reward("incompress")
class IncompressReward:
    """The JPEG size in kB.

    Args:
        quality: JPEG quality, 1 to 100.

    Raises:
        ConfigError: There is no such quality.
    """

    sign, what = 1, "the JPEG size in kB"
    takes = UNIT
    on_host = True

    def __init__(self, quality: int = 95) -> None:
        if not 1 <= quality <= 100:  # others are taken for the nearest, without a word
            raise ConfigError(f"The JPEG quality must be 1 to 100, not {quality}.")
        self.quality = quality
        self.description = f"{self.what} at quality {quality}"

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward images (B, 3, H, W) in [0, 1]."""
        return RewardOutput(self.sign * jpeg_kilobytes(images, self.quality))


@register_reward("compress")
class CompressReward(IncompressReward):
    """Minus the JPEG size in kB.

    Args:
        quality: JPEG quality, 1 to 100.

    Raises:
        ConfigError: There is no such quality.
    """

    sign, what = -1, "minus the JPEG size in kB"
