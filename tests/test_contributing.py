"""The snippets of CONTRIBUTING.md run as they stand, through the API and through the command line."""

from __future__ import annotations

import importlib

import gymnasium
import pytest
from conftest import forgetting
from pages import ROOT, blocks, write_modules

import flowrl

PAGE = ROOT / "CONTRIBUTING.md"


@pytest.fixture
def folder(tmp_path):
    assert write_modules(PAGE, tmp_path) == ["my_envs", "my_algos"]
    return tmp_path


def test_snippets_are_short():
    lines = {b.module: sum(bool(line.strip()) for line in b.text.splitlines()) for b in blocks(PAGE) if b.module}
    assert lines["my_envs"] <= 15
    assert lines["my_algos"] <= 40


def test_through_the_api(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    with forgetting("my_envs", "my_algos"):
        importlib.import_module("my_envs")
        algos = importlib.import_module("my_algos")
        env = gymnasium.make("flowrl/red-sd3-v0")
        env.reset(seed=0)
        env.step(env.action_space.sample())
        settings = {"n_samples": 8, "batch_size": 8, "rollout_steps": 2, "share": 0.5}
        model = algos.BestShare("FlowPolicy", "red-sd3", seed=0, device="cpu", **settings).learn(8)
        model.save("saved")
        assert algos.BestShare.load("saved", device="cpu").num_timesteps == 8
        assert model.policy.sample(["two stars"], steps=2).shape == (1, 3, 64, 64)
        assert "reward" in flowrl.evaluate(model, n_samples=4, samples_per_context=2).table()


@pytest.mark.parametrize(
    "choice",
    [
        ["--algo", "orw_w2", "--env", "my_envs:red-sd3"],
        ["--algo", "my_algos:BestShare", "--env", "gaussians-linear", "--algo.share", "0.1"],
    ],
)
def test_through_the_command_line(folder, choice, run_here, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    sizes = ["--algo.n-samples", "8", "--algo.batch-size", "8", "--algo.rollout-steps", "2", "--eval-samples", "8"]
    with forgetting("my_envs", "my_algos"):
        result = run_here("flowrl.run", *choice, *sizes, "--total-timesteps", "8", "--name", "r")
    assert result.returncode == 0, result.stderr
    assert (folder / "runs" / "r" / "final" / "state.json").exists()
