"""Emoji: real colour pictures of 32x32 pixels, by group; the reward is how well they compress as JPEG files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from flowrl.envs.rewards.compress import CompressReward
from flowrl.envs.text_to_image import TextToImageEnv
from flowrl.errors import ConfigError
from flowrl.models.loading import ASSETS, source_of
from flowrl.registry import EnvSpec

SIZE, COLUMNS = 32, 41
FOLDER = ASSETS / "emoji"
GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
)


class Emoji(NamedTuple):
    """Pictures (n, 3, 32, 32) in [0, 1], over white; their names and groups."""

    pictures: torch.Tensor
    names: list[str]
    groups: list[str]


def real_emoji() -> Emoji:
    """Load the 1,636 pictures that the shipped flow is trained on: Google's Noto emoji without flags and skin tones."""
    entries = json.loads((FOLDER / "emoji.json").read_text(encoding="utf-8"))
    sheet = torch.from_numpy(np.asarray(Image.open(FOLDER / "emoji.png").convert("RGB")).copy())
    rows = sheet.shape[0] // SIZE
    cells = sheet.view(rows, SIZE, COLUMNS, SIZE, 3).permute(0, 2, 4, 1, 3).reshape(-1, 3, SIZE, SIZE)
    names, groups, _ = zip(*entries)
    return Emoji(cells[: len(entries)].float() / 255, list(names), list(groups))


@dataclass(frozen=True)
class EmojiConfig:
    """Settings of `emoji-compress`."""

    flow: str = "emoji"
    """Flow to fine-tune: "emoji" (shipped), or a folder that `pretrain/emoji/train.py` wrote."""
    groups: tuple[str, ...] = GROUPS
    """Groups of emoji to draw."""
    quality: int = 95
    """JPEG quality, 1 to 100."""

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"quality must be 1 to 100, not {self.quality}.")


def _make(config: EmojiConfig, render_mode: str | None = None) -> TextToImageEnv:
    source = source_of(config.flow)
    if source.sample_shape != (3, SIZE, SIZE):
        raise ConfigError(f"'emoji-compress' needs a flow of samples of shape (3, 32, 32), not {source.sample_shape}.")
    reward = CompressReward(config.quality)
    return TextToImageEnv(source, config.groups, reward, name="emoji-compress", render_mode=render_mode)


RECOMMENDED: Mapping[str, Any] = {
    "n_samples": 128,
    "batch_size": 32,
    "n_epochs": 3,
    "rollout_steps": 10,
    "learning_rate": 5e-4,
    # rewards spread by 0.1 kB; weights of mean one in each group, as all rewards are negative and groups differ
    "tau": 10.0,
    "weight_normalisation": "group",
    "endpoint.target": "plain",  # as published
    "endpoint.alpha": 0.2,
    "endpoint-free.target": "plain",
}

SPECS = [
    EnvSpec(
        name="emoji-compress",
        factory=_make,
        config=EmojiConfig(),
        recommended=lambda config: RECOMMENDED,
        total_timesteps=640,
        summary="emoji of 32x32 pixels by group: make them compress well, minus the JPEG size in kB",
    )
]
