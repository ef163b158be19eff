"""Rewards of images refuse images of another range, wherever they are called."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

import flowrl
from flowrl.envs.rewards import make_reward
from flowrl.envs.rewards.catalogue import REWARDS, ModelReward, register_reward
from flowrl.envs.rewards.mixture import make_mixture
from flowrl.envs.rewards.ranges import TOLERANCE
from flowrl.errors import ConfigError, RewardError

PROMPTS = ["three red stars on blue"] * 2
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WRONG = {
    "uint8": ((255 * IMAGES).byte(), r"whole numbers (torch.uint8). Divide them by 255: images.float() / 255."),
    "[0, 255]": (255 * IMAGES, "They look like [0, 255]: pass images / 255."),
    "[-1, 1]": (2 * IMAGES - 1, "They look like [-1, 1]: pass images / 2 + 0.5."),
    "overshot": (IMAGES * 1.5, "where a decoder overshoots, clamp them: images.clamp(0, 1)."),
    "nan": (IMAGES * torch.nan, "hold values that are not finite (from nan to nan)"),
}
SHIPPED = sorted(
    name
    for name, entry in REWARDS.items()
    if getattr(entry.factory, "__module__", "").startswith("flowrl.envs.rewards")
)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowrl.envs.rewards.catalogue.REWARDS", dict(REWARDS))


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["colourfulness", "compress", "incompress", "count"])
def test_other_ranges_are_refused_with_the_remedy(name: str, kind: str) -> None:
    images, remedy = WRONG[kind]
    with pytest.raises(RewardError, match=rf"^The reward '{name}' takes images with values in \[0, 1\]") as raised:
        make_reward(name)(images, PROMPTS)
    assert remedy in str(raised.value)


def test_the_range_that_came_is_named() -> None:
    images = IMAGES.clone()
    images[0, 0, 0, 0], images[1, 2, 3, 3] = -3, 7
    with pytest.raises(RewardError, match=r"these go from -3 to 7\. Scale them"):
        make_reward("compress")(images, PROMPTS)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "remote"])  # remote takes anything
def test_every_reward_of_images_says_what_it_takes(name: str) -> None:
    assert REWARDS[name].factory.takes == (0.0, 1.0)
    assert hasattr(REWARDS[name].factory.__call__, "unwatched")


def test_what_decoders_overshoot_is_taken() -> None:
    wide = (IMAGES - 0.5) * (1 + 2 * 0.9 * TOLERANCE) + 0.5
    assert wide.min() < 0 < 1 < wide.max()
    assert make_reward("compress")(wide, PROMPTS).reward.shape == (2,)
    assert make_reward("compress")(IMAGES[:0], []).reward.shape == (0,)


def test_in_mixtures_comparisons_and_environments() -> None:
    images = 255 * IMAGES
    for reward in ("winrate(compress)", "compress:1+colourfulness:1"):
        with pytest.raises(RewardError, match=r"'compress' takes images"):
            make_mixture(reward)(images, PROMPTS)
    env = flowrl.make("sd3-compress", flow="mini-sd3")
    env.reset(seed=0)
    with pytest.raises(RewardError, match=r"'compress' takes images.*pass images / 255"):
        env.step(np.random.default_rng(0).integers(0, 256, (3, 64, 64)))


def test_an_inherited_call_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("flowrl.envs.rewards.ranges.check_range", lambda images, name, *range: seen.append(name))
    make_reward("compress")(IMAGES, PROMPTS)
    assert seen == ["compress"]


def test_rewards_of_ones_own(registered: None) -> None:
    """Functions, pairwise rewards and networks; those that say nothing take anything."""

    def anything(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return images.float().mean((1, 2, 3))

    def symmetric(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return images.mean((1, 2, 3))

    def judge(images_a: torch.Tensor, images_b: torch.Tensor, prompts: Any) -> torch.Tensor:
        return (images_a.mean((1, 2, 3)) > images_b.mean((1, 2, 3))).float()

    class Network(ModelReward):
        def reward(self, images: torch.Tensor, prompts: Any) -> Any:
            return images.mean((1, 2, 3))

    symmetric.takes = (-1.0, 1.0)  # type: ignore[attr-defined]
    judge.takes, judge.pairwise = (0.0, 1.0), True  # type: ignore[attr-defined]
    for name, reward in {"anything": anything, "symmetric": symmetric, "judge": judge, "network": Network}.items():
        register_reward(name)(reward)
    assert make_mixture("anything")(255 * IMAGES, PROMPTS).shape == (2,)
    assert make_mixture("symmetric")(2 * IMAGES - 1, PROMPTS).shape == (2,)
    for name, images in {"symmetric": 255 * IMAGES, "judge": 2 * IMAGES - 1, "network": 2 * IMAGES - 1}.items():
        with pytest.raises(RewardError, match=re.escape(f"'{name}' takes images")):
            make_mixture(name)(images, PROMPTS)
    judge.takes = (1.0, 0.0)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"'wrong' must say `takes = \(LEAST, GREATEST\)`"):
        register_reward("wrong")(judge)


def test_gradients_flow_through(registered: None) -> None:
    def brightness(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return images.mean((1, 2, 3))

    brightness.takes = (0.0, 1.0)  # type: ignore[attr-defined]
    images = IMAGES.clone().requires_grad_()
    register_reward("brightness")(brightness)(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert torch.allclose(images.grad, torch.full_like(images, 1 / (3 * 16 * 16)))
