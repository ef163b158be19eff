"""Training on a device whose memory is apart from the CPU's (`far_device.py`): nothing is mixed, updates do not wait.

They run in a process of their own, `FLOWRL_TEST_DEVICE=far`, which the last test starts where the others are left out.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_pipelines
import torch
from conftest import DEVICE, REPOSITORY
from far_device import Far, no_float64, no_waiting, possible, waits

import flowrl
from flowrl.evaluation import measure
from flowrl.functional import exact
from flowrl.registry import ALGORITHMS

pytestmark = pytest.mark.on_device
there_only = pytest.mark.skipif(DEVICE != "far", reason="of the device 'far', where the last test here runs it")

NAMES = sorted(name for name, cls in ALGORITHMS.items() if cls.__module__.startswith("flowrl."))
ASK_WHILE_THEY_UPDATE = {"draft", "refl"}
"""Algorithms whose updates ask the environment for rewards, which takes the numbers of the prompts."""
SETTINGS: dict[str, Any] = {"n_samples": 32, "batch_size": 16, "n_epochs": 1, "rollout_steps": 3}
OWN = {"kl": {"tolerance": 100.0}, "tilt": {"pool": 64}}  # the fewest steps of a likelihood, and little to draw


def make(name: str, device: str = DEVICE, env: str = "gaussians-quadratic", **settings: Any) -> Any:
    given = {**SETTINGS, **OWN.get(name, {}), **settings}
    return ALGORITHMS[name]("FlowPolicy", env, seed=0, device=device, **given)


@there_only
def test_tensors_of_two_devices_do_not_mix() -> None:
    near, far = torch.ones(3, device="cpu"), torch.ones(3, device="far")
    with pytest.raises(RuntimeError, match="same device, but add got"):
        far + near
    with pytest.raises(RuntimeError, match="same device, but index got"):
        near[torch.zeros(1, dtype=torch.long, device="far")]
    with pytest.raises(TypeError, match="convert far:0"):
        far.numpy()
    assert isinstance(far + near[0], Far)  # a number
    assert isinstance(far[torch.tensor([0], device="cpu")], Far)
    assert not isinstance(far.cpu(), Far)
    for device in ("cpu", "far"):  # a generator draws on its own device only
        assert torch.randn(3, generator=torch.Generator(device)).device.type == device


@there_only
@pytest.mark.parametrize(
    "asks",
    [
        lambda far: far.sum().item(),
        lambda far: far.tolist(),
        lambda far: far[far > 0],
        lambda far: bool((far > 0).all()),
        lambda far: torch.tensor([1.0, 2.0], device="far"),
        lambda far: far + torch.ones(3, device="cpu").to("far"),
    ],
)
def test_a_host_that_waits_is_seen(asks: Any) -> None:
    far = torch.ones(3, device="far")
    waits.clear()
    asks(far)
    assert len(waits) == 1
    with pytest.raises(RuntimeError, match="the host waits"), no_waiting():
        asks(far)
    with no_waiting():
        far.mul_(2).add_(torch.zeros(3, device="far")).masked_fill_(far > 3, 0.0)


@there_only
@pytest.mark.parametrize("name", NAMES)
def test_an_algorithm_trains_there_as_on_the_cpu(name: str) -> None:
    there, here = make(name), make(name, "cpu")
    for model in (there, here):
        model.learn(32)
    weights = [[p.detach() for p in model.policy.parameters_of("current").values()] for model in (there, here)]
    assert {type(tensor) for tensor in weights[0]} == {Far}
    assert torch.equal(there.buffer.reward.cpu(), here.buffer.reward)
    torch.testing.assert_close([tensor.cpu() for tensor in weights[0]], weights[1], atol=1e-5, rtol=1e-5)
    if name not in ASK_WHILE_THEY_UPDATE:
        with no_waiting():
            there.update()
            there.refresh()


@there_only
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("orw_w2", {"priority": 0.5, "paired_noise": True, "group_size": 4, "weight_normalisation": "group"}),
        ("orw_w2", {"time_weighting": "variance", "ema_decay": 0.9, "max_own_loss": 1.2, "lora_rank": 2}),
        ("tilt", {"reward_units": "std"}),
        ("nft", {"coupling": "c2ot"}),  # minibatches are coupled on the host
        ("orw_w2", {"env": "plan-pendulum", "group_size": 4}),
    ],
    ids=str,
)
def test_settings_and_environments_train_there(name: str, settings: dict[str, Any]) -> None:
    model = make(name, **settings)
    model.learn(32)
    if "coupling" not in settings:
        with no_waiting():
            model.update()
    assert all(bool(weight.isfinite().all()) for weight in model.policy.parameters_of("current").values())


@there_only
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("orw_w2", {}),
        ("orw_w2", {"coupling": "ot", "target": "plain"}),
        ("nft", {"coupling": "c2ot"}),
        ("kl", {}),
        ("orw_w2", {"env": "plan-pendulum", "group_size": 4}),
        ("orw_w2", {"env": "plan-mountaincar", "group_size": 4}),
        ("orw_w2", {"env": "darcy"}),
    ],
    ids=str,
)
def test_a_device_without_float64_trains_and_evaluates(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "WITHOUT_FLOAT64", {"far"})
    with no_float64():
        there = make(name, **settings)
        there.learn(32)
        assert flowrl.evaluate(there, n_samples=8).diversity > 0
    here = make(name, "cpu", **settings)
    here.learn(32)
    torch.testing.assert_close(there.buffer.reward.cpu(), here.buffer.reward)


@there_only
def test_an_iteration_waits_a_few_times() -> None:
    """For prompts and two constants of this reward, then to know what is finite, whether there is a signal, to log."""
    model = make("orw_w2")
    model.learn(32)
    waits.clear()
    model.learn(32, reset_num_timesteps=False)
    assert len(waits) == 8, waits


@there_only
def test_pictures_are_drawn_and_rewarded_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"reward": "colourfulness", "prompts": tuple(small_pipelines.PROMPTS)}
    settings = {"env_settings": {"flow": str(small_pipelines.sd3(tmp_path / "sd3")), **own}, "group_size": 2}
    model = make("orw_w2", env="sd3-aesthetic", **settings, n_samples=8, batch_size=8, lora_rank=2)
    model.learn(8)
    with no_waiting():
        model.update()
    kept, statistics = [], measure.statistics
    monkeypatch.setattr(measure, "statistics", lambda *args: kept.append(args[1]) or statistics(*args))
    result = flowrl.evaluate(model, n_samples=8, eval_rewards={"own": lambda images, prompts: images.mean((1, 2, 3))})
    assert not any(isinstance(samples, Far) for samples in kept), (
        "all of an evaluation's samples are too much for a GPU"
    )
    assert torch.tensor([result.reward_mean, result.diversity]).isfinite().all()


@pytest.mark.on_device(False)
@pytest.mark.skipif(not possible(), reason="this version of torch has no devices in Python")
@pytest.mark.timeout(900)
def test_all_of_this_on_the_far_device(program_environment: dict[str, str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__],
        env={**program_environment, "FLOWRL_TEST_DEVICE": "far", "PYTEST_ADDOPTS": ""},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-2000:]
    assert f"{len(NAMES) + 21} passed" in ended.stdout
