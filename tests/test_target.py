"""The tilt that algorithms aim at, in the same units for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowrl.errors import ConfigError
from flowrl.registry import ALGORITHMS
from flowrl.training.target import spread
from flowrl.types import Batch

AIMING = sorted(name for name, cls in ALGORITHMS.items() if cls.tilt_setting is not None)
SMALL: dict[str, Any] = {"n_samples": 32, "batch_size": 16, "rollout_steps": 4, "n_epochs": 1, "group_size": 8}
OWN: dict[str, dict[str, Any]] = {
    "adrpo": {"critic_learning_rate": 1e-3},
    "kl": {"tolerance": 0.3},
    "rvm": {"beta_ref": 0.5},
    "tilt": {"pool": 64},
}


def made(name: str, **settings: Any) -> Any:
    return ALGORITHMS[name](
        "FlowPolicy", "gaussians-linear", seed=0, device="cpu", **{**SMALL, **OWN.get(name, {}), **settings}
    )


@pytest.mark.parametrize("name", AIMING)
def test_every_coefficient_can_be_given_as_the_tilt(name: str, tmp_path: Path) -> None:
    model = made(name, target_lambda=1.7)
    before = getattr(model.config, model.tilt_setting[0])
    model.learn(32)
    assert model.last_logged["rollout/target_lambda"] == pytest.approx(1.7, rel=1e-5)
    value = getattr(model.config, model.tilt_setting[0])
    assert value != before
    model.save(tmp_path / "saved")
    again = type(model).load(tmp_path / "saved", device="cpu")
    again.learn(32, reset_num_timesteps=False)
    assert getattr(again.config, model.tilt_setting[0]) == value  # it was set once, for good


@pytest.mark.parametrize("name", AIMING)
def test_lambda_is_proportional_to_the_setting(name: str) -> None:
    model = made(name)
    setting, power = model.tilt_setting
    std = torch.tensor(0.8)
    doubled = made(name, **{setting: 2 * getattr(model.config, setting)})
    torch.testing.assert_close(doubled.tilt_of(std), model.tilt_of(std) * 2.0**power)


def test_the_spread_is_that_within_groups() -> None:
    batch = Batch.of(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long))
    batch = batch._replace(reward=torch.tensor([0.0, 2.0, 10.0, 12.0]), group=torch.tensor([0, 0, 1, 1]))
    assert spread(batch, 2) == 1
    torch.testing.assert_close(spread(batch, 1), batch.reward.std(correction=0))


def test_an_algorithm_without_a_stated_tilt_says_so() -> None:
    with pytest.raises(ConfigError, match="orw_w2 states no tilt that it aims at with these settings"):
        made("orw_w2", target_lambda=1.0).learn(32)
    with pytest.raises(ConfigError, match="rwr states no tilt"):
        made("rwr", mode="online", target_lambda=1.0).learn(32)
