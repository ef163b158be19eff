"""The tilt that algorithms aim at, in the same units for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flowrl
from flowrl.errors import ConfigError
from flowrl.registry import ALGORITHMS, environment_spec
from flowrl.runs.commandline import second_pass
from flowrl.runs.folder import write_config
from flowrl.storage.files import read_json
from flowrl.training.target import aimed, held, spread
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
    for other in ({"target_lambda": 0.9}, {"env": "gaussians-quadratic"}):  # of another reward
        anew = type(model).load(tmp_path / "saved", device="cpu", **other)
        anew.learn(32, reset_num_timesteps=False)
        expected = other.get("target_lambda", 1.7)
        assert anew.last_logged["rollout/target_lambda"] == pytest.approx(expected, rel=1e-5)
        if name != "tilt" or "env" not in other:  # whose rewards are in no units
            assert getattr(anew.config, model.tilt_setting[0]) != value


def test_the_config_of_a_run_keeps_what_was_asked_for(tmp_path: Path) -> None:
    model = made("rwr", target_lambda=1.7)
    write_config(tmp_path, model, {})
    asked = read_json(tmp_path / "config.json")["settings"]
    model.learn(32)
    write_config(tmp_path, model, {})  # as a resumed run does
    assert read_json(tmp_path / "config.json")["settings"] == asked
    model.save(tmp_path / "saved")
    assert read_json(tmp_path / "saved" / "config.json")["settings"] != asked


@pytest.mark.parametrize("name", AIMING)
def test_lambda_is_proportional_to_the_setting(name: str) -> None:
    model = made(name, target_lambda=0.0)
    setting, power = model.tilt_setting
    std = torch.tensor(0.8)
    doubled = made(name, **{setting: 2 * getattr(model.config, setting)})
    torch.testing.assert_close(doubled.tilt_of(std), model.tilt_of(std) * 2.0**power)


@pytest.mark.parametrize("name", [n for n in AIMING if not ALGORITHMS[n].needs_gradient])
def test_the_target_is_held_while_the_spread_of_rewards_changes(name: str) -> None:
    """Rewards half as far apart: divided by their spread they give the same advantages, which then count half.

    Coefficient and advantages together state the tilt; weights are as before.
    """
    model = made(name, target_lambda=1.7)
    model.learn(32)
    rollout = model.buffer.all()
    if model.has_weights:
        before = rollout.coefficient.clone()
        assert torch.equal(held(model, rollout, before), before)
        return
    first = held(model, rollout, model.advantage(rollout))
    torch.testing.assert_close(first, model.advantage(rollout), rtol=1e-5, atol=1e-6)
    near = rollout._replace(reward=rollout.reward / 2)
    torch.testing.assert_close(held(model, near, model.advantage(near)), first / 2, rtol=2e-3, atol=1e-4)
    assert float(aimed(model, near)) == pytest.approx(1.7)
    own = made(name, target_lambda=0.0)
    own.learn(32)
    again = own.buffer.all()
    assert torch.equal(held(own, again, own.advantage(again)), own.advantage(again))  # only where it is asked for


def test_the_spread_is_that_within_groups() -> None:
    batch = Batch.of(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long))
    batch = batch._replace(reward=torch.tensor([0.0, 2.0, 10.0, 12.0]), group=torch.tensor([0, 0, 1, 1]))
    assert spread(batch, 2) == 1
    torch.testing.assert_close(spread(batch, 1), batch.reward.std(correction=0))


@pytest.mark.parametrize("name", ["rwr", "dpok"])
def test_the_unit_of_standardised_rewards_is_what_they_were_divided_by(name: str) -> None:
    """Contexts of other means: the spread within contexts or groups is not that of the iteration."""
    env = flowrl.make("sd3-compress", flow="mini-sd3", prompts=("a", "b"), resolution=32)
    own = {"n_samples": 16, "batch_size": 16, "rollout_steps": 2, "n_epochs": 1, "target_lambda": 0.0, "ema_decay": 0.0}
    for group_size in (1, 4):
        for standardise in ("batch", "group"):
            kind: dict[str, Any] = {**own, "group_size": group_size, "standardise": standardise}
            model: Any = ALGORITHMS[name]("FlowPolicy", env, seed=0, device="cpu", **kind)
            ids = torch.arange(4).repeat_interleave(4) % 2
            reward = 10.0 * ids + torch.randn(16, generator=torch.Generator().manual_seed(0))
            rollout = Batch.of(torch.zeros(16, 1), ids)._replace(reward=reward, group=torch.arange(16) // group_size)
            std = reward.std(correction=0)
            if standardise == "group":
                means = torch.stack([reward[ids == i].mean() for i in range(2)])
                std = (reward - means[ids]).std(correction=0)
            coefficient = model.config.tau if name == "rwr" else model.config.reward_weight / model.config.beta
            torch.testing.assert_close(aimed(model, rollout), coefficient / std, rtol=1e-3, atol=0)


@pytest.mark.parametrize("settings", [{"ratio": "guard"}, {"step_weighting": "noise"}], ids=str)
def test_steps_weighted_by_their_noise_aim_at_no_tilt(settings: dict[str, Any]) -> None:
    model = made("flow_grpo", **settings)
    model.learn(32)
    assert "rollout/target_lambda" not in model.last_logged
    with pytest.raises(ConfigError, match="flow_grpo states no tilt"):
        made("flow_grpo", target_lambda=1.7, **settings).learn(32)


@pytest.mark.parametrize("name", ["nft", "rwr"])
def test_samples_with_their_own_noise_come_to_no_tilt(name: str) -> None:
    with pytest.warns(UserWarning, match="the flow is straightened"):
        model = made(name, coupling="rectified")
    model.learn(32)
    assert model.config.target_lambda == 0  # which was the environment's
    assert "rollout/target_lambda" not in model.last_logged
    with pytest.warns(UserWarning, match="straightened"), pytest.raises(ConfigError, match=f"{name} states no tilt"):
        made(name, coupling="rectified", target_lambda=1.7).learn(32)


def test_an_algorithm_without_a_stated_tilt_says_so() -> None:
    with pytest.raises(ConfigError, match="orw_w2 states no tilt that it aims at with these settings"):
        made("orw_w2", target_lambda=1.0).learn(32)
    with pytest.raises(ConfigError, match="rwr states no tilt"):
        made("rwr", mode="online", target_lambda=1.5).learn(32)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_on_the_toys_all_that_state_a_tilt_aim_at_the_optimum(name: str) -> None:
    """Of the environment's own tau, unless the coefficient is given; who states none does without."""
    cls: Any = ALGORITHMS[name]
    env = flowrl.make("gaussians-ring", tau=0.5)
    recommended = {key: value for key, value in OWN.get(name, {}).items() if key in ("tolerance", "pool")}
    own = {"n_samples": 512, "batch_size": 512, "rollout_steps": 4, "n_epochs": 1, "group_size": 8}
    model = cls("FlowPolicy", env, seed=0, device="cpu", **own, **recommended)
    assert model.config.target_lambda == (0.5 if cls.tilt_setting else 0)
    if cls.tilt_setting is None or name in ("adrpo", "rvm"):
        return
    model.learn(512)
    assert model.last_logged["rollout/target_lambda"] == pytest.approx(0.5, rel=1e-4)
    setting = cls.tilt_setting[0]
    given = cls("FlowPolicy", env, seed=0, device="cpu", **own, **recommended, **{setting: 0.25})
    assert (given.config.target_lambda, getattr(given.config, setting)) == (0, 0.25)


def test_a_recommended_target_gives_way_where_there_is_no_tilt() -> None:
    model = made("rwr", mode="online")
    assert model.config.target_lambda == 1
    model.learn(32)
    assert model.config.target_lambda == 0
    assert "rollout/target_lambda" not in model.last_logged


def test_a_coefficient_on_the_command_line_is_meant() -> None:
    args = ["--algo", "flow_grpo", "--env", "gaussians-linear"]
    usual = str(ALGORITHMS["flow_grpo"].configure(recommended={}).beta)  # given, it is meant as any other
    cases = {(): 1.0, ("--algo.beta", "0.5"): 0.0, ("--algo.beta", usual): 0.0, ("--algo.target-lambda", "2"): 2.0}
    for given, expected in {**cases, ("--algo.beta=0.5", "--algo.target_lambda", "1"): 1.0}.items():
        _, config, _ = second_pass([*args, *given], ALGORITHMS["flow_grpo"], environment_spec(args[-1]), None)
        assert config is not None
        assert config.target_lambda == expected
