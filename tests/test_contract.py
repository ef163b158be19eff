"""What holds for every registered algorithm, on a toy and on a text-to-image flow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import small_pipelines
import torch
from conftest import DEVICE, made_once

import flowrl
from flowrl.errors import ConfigError, UnknownNameError
from flowrl.registry import ALGORITHMS

pytestmark = pytest.mark.on_device

SMALL = {
    "gaussians-linear": {"n_samples": 32, "group_size": 8, "batch_size": 16, "rollout_steps": 4},
    "sd3-compress": {"n_samples": 8, "group_size": 4, "batch_size": 8, "rollout_steps": 3, "n_epochs": 1},
}
SMALL["sd3-count"] = SMALL["sd3-compress"]
OWN_ALGORITHMS = sorted(name for name, cls in ALGORITHMS.items() if cls.__module__.startswith("flowrl."))
OF_EACH_BASE = ("adjoint", "crd", "draft", "flow_grpo", "nft", "orw_w2", "tilt")
"""Algorithms that train all weights of pictures and adapters of a toy, too, not just the other way round."""


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 3 of a few weights."""
    return made_once(tmp_path_factory, "contract-sd3", lambda folder: small_pipelines.sd3(folder / "sd3")) / "sd3"


def make(name: str, env: str, flow: Path | None = None, **settings: object) -> flowrl.FlowAlgorithm:
    own: dict[str, Any] = {}
    cls, settings_of_env = flowrl.algorithm_class(name), SMALL[env]
    if env == "sd3-compress":
        own["env_settings"] = {"flow": str(flow), "prompts": tuple(small_pipelines.PROMPTS)}
        own["env_settings"] |= {"resolution": 16, "sequence_length": 16}  # most of the work would be padding of prompts
    if cls.needs_gradient and env == "sd3-compress":  # no gradient there; colourfulness has one
        env, own["env_settings"]["reward"] = "sd3-aesthetic", "colourfulness"
    if name == "kl" and env != "gaussians-linear":  # the fewest steps that a likelihood takes
        own["tolerance"] = 100.0
    if name == "tilt" and env != "gaussians-linear":  # each of its contexts is drawn and decoded for
        own["pool"] = 64
    return cls("FlowPolicy", env, seed=0, device=DEVICE, **{**settings_of_env, **own, **settings})


def weights(model: flowrl.FlowAlgorithm) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.policy.parameters_of("current").values()]


@pytest.mark.parametrize(
    ("name", "env", "lora_rank"),
    [
        *((name, *with_) for name in OWN_ALGORITHMS for with_ in (("gaussians-linear", 0), ("sd3-compress", 4))),
        *((name, *with_) for name in OF_EACH_BASE for with_ in (("gaussians-linear", 4), ("sd3-compress", 0))),
        *(("orw_w2", "sd3-count", rank) for rank in (0, 4)),
    ],
)
def test_trains_saves_resumes_and_evaluates(
    name: str, env: str, lora_rank: int, pipeline: Path, tmp_path: Path
) -> None:
    model = make(name, env, pipeline, lora_rank=lora_rank)
    n, before = model.config.n_samples, weights(model)
    model.learn(n)
    model.save(tmp_path / "saved")
    model.learn(n, reset_num_timesteps=False)
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(model)))
    assert all(bool(w.isfinite().all()) for w in weights(model))
    again = type(model).load(tmp_path / "saved", device=DEVICE)
    again.learn(n, reset_num_timesteps=False)
    assert again.num_timesteps == model.num_timesteps == 2 * n
    assert again.policy.evaluations == model.policy.evaluations
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(again)))
    result = flowrl.evaluate(model, n_samples=8)
    assert result.n_samples == 8
    assert torch.isfinite(torch.tensor([result.reward_mean, result.reference.reward_mean, result.drift])).all()


@pytest.mark.parametrize("name", [name for name in OWN_ALGORITHMS if ALGORITHMS[name].needs_gradient])  # type: ignore[attr-defined]
def test_a_reward_without_gradient_is_refused_before_anything_is_drawn(name: str) -> None:
    """What is missing is named, and which algorithms would do."""
    missing = rf"'{name}' needs the gradient of the reward by the samples, and the reward of 'sd3-count' has none\."
    with pytest.raises(ConfigError, match=missing + r".*differentiable.*values only: .*flow_grpo, .*orw_w2, .*tilt\.$"):
        flowrl.algorithm_class(name)("FlowPolicy", "sd3-count", seed=0, device=DEVICE, **SMALL["sd3-count"])


@pytest.mark.parametrize("name", OWN_ALGORITHMS)
def test_same_seed_same_weights(name: str) -> None:
    models = [make(name, "gaussians-linear").learn(64) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*map(weights, models)))


@pytest.mark.parametrize("name", OWN_ALGORITHMS)
def test_every_setting_has_a_default_and_a_description(name: str) -> None:
    config = ALGORITHMS[name].Config
    assert dataclasses.is_dataclass(config)
    sources = [Path(__import__(c.__module__, fromlist=["_"]).__file__).read_text() for c in config.__mro__[:-1]]
    for field in dataclasses.fields(config):
        stated = [s.split(f"    {field.name}: ", 1)[1] for s in sources if f"    {field.name}: " in s]
        assert stated, field.name
        assert stated[0].split("\n")[1].strip().startswith('"""'), f"{name}.{field.name} has no description"


@pytest.mark.parametrize("name", OWN_ALGORITHMS)
@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"n_sampels": 3}, UnknownNameError),
        ({"n_samples": 0}, ConfigError),
        ({"group_size": 7}, ConfigError),
        ({"rollout_steps": 0}, ConfigError),
    ],
    ids=str,
)
def test_wrong_settings_are_explained(name: str, settings: dict, error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(settings))):
        make(name, "gaussians-linear", **settings)
