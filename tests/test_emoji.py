"""Emoji: the pictures that ship, the class-conditional flow, and the reward."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import flowrl
from flowrl.envs.emoji import GROUPS, real_emoji
from flowrl.errors import ConfigError

TINY = {"n_samples": 16, "group_size": 2, "batch_size": 16, "rollout_steps": 2}


def test_the_pictures() -> None:
    emoji = real_emoji()
    assert emoji.pictures.shape == (1636, 3, 32, 32)
    assert len(emoji.names) == len(emoji.groups) == 1636
    assert Counter(emoji.groups).keys() == set(GROUPS)
    assert min(Counter(emoji.groups).values()) == 85
    assert bool((emoji.pictures.flatten(1).amax(1) > 0.99).all())  # white somewhere
    heart = emoji.pictures[emoji.names.index("heavy black heart")]
    red, green, blue = heart[:, 12:20, 12:20].mean((1, 2)).tolist()
    assert red > 0.8 > 0.4 > max(green, blue)
    apple = emoji.pictures[emoji.names.index("green apple")][:, 14:24, 10:22].mean((1, 2)).tolist()
    assert apple[1] > max(apple[0], apple[2])
    first = np.asarray(Image.open(flowrl.envs.emoji.FOLDER / "emoji.png").convert("RGB"))[:32, 32:64]
    assert np.array_equal((255 * emoji.pictures[1]).round().byte().permute(1, 2, 0).numpy(), first)  # row by row


def test_the_reward_is_the_size_of_a_jpeg_file() -> None:
    env, pictures = flowrl.make("emoji-compress"), real_emoji().pictures[:4]
    reward = env.evaluate(pictures, torch.arange(4)).reward
    for picture, value in zip(pictures, reward.tolist()):
        file = io.BytesIO()
        pixels = (255 * picture).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file, format="JPEG", quality=95)
        assert value == pytest.approx(-file.tell() / 1000)
    small = flowrl.make("emoji-compress", quality=30).evaluate(pictures, torch.arange(4)).reward
    assert bool((small > reward).all())


def test_trains_on_groups() -> None:
    settings = {"groups": ("Symbols", "Objects")}
    model = flowrl.ORWCFMW2("FlowPolicy", "emoji-compress", seed=0, device="cpu", env_settings=settings, **TINY)
    assert model.env.core.contexts == ["Symbols", "Objects"]
    model.learn(16)
    result = flowrl.evaluate(model, n_samples=16)
    assert {row["prompt"] for row in result.per_prompt} == {"Symbols", "Objects"}
    assert result.drift > 0
    assert "colourfulness" in result.side
    x_0 = torch.randn(1, 3, 32, 32).expand(3, -1, -1, -1)
    one, other, guided = (
        model.policy.sample(torch.tensor([i, i, i]), x_0=x_0, guidance_scale=scale)
        for i, scale in ((0, 1.0), (1, 1.0), (0, 3.0))
    )
    assert not torch.allclose(one, other)  # the group is heeded
    assert not torch.allclose(one, guided)


def test_wrong_settings_are_explained() -> None:
    with pytest.raises(ConfigError, match=r"no class 'Symbol', .*Did you mean 'Symbols'"):
        flowrl.ORWCFMW2("FlowPolicy", "emoji-compress", device="cpu", env_settings={"groups": ("Symbol",)}, **TINY)
    with pytest.raises(ConfigError, match="quality must be 1 to 100"):
        flowrl.make("emoji-compress", quality=0)
    with pytest.raises(ConfigError, match=r"samples of shape \(3, 32, 32\), not \(1, 8, 8\)"):
        flowrl.make("emoji-compress", flow="digits")


def test_the_shipped_flow_draws_things_over_white() -> None:
    """White at the border and colours within, as in the real pictures."""
    model = flowrl.ORWCFMW2("FlowPolicy", "emoji-compress", seed=0, device="cpu", **TINY)
    drawn = model.policy.sample(torch.arange(8).repeat(4), steps=10)
    real = real_emoji().pictures
    corners = [pictures[:, :, :3, :3].mean().item() for pictures in (drawn, real)]
    assert corners[0] == pytest.approx(corners[1], abs=0.1)
    spread = [pictures.std(1).mean().item() for pictures in (drawn, real)]  # over channels: colour
    assert 0.5 * spread[1] < spread[0] < 1.5 * spread[1]
    reward = model.env.core.evaluate(drawn, torch.arange(8).repeat(4)).reward.mean().item()
    assert -2.2 < reward < -0.7
