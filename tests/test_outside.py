"""Algorithms as strangers write them (tests/outside): short, and with everything that the library's own have."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE
from outside import adjoint, awm, dpo, draft, fpo, nft, tilt
from test_architecture import code_lines

import flowrl
from flowrl.errors import ConfigError
from flowrl.runs.callbacks import HeldOutCallback
from flowrl.training.memory_plan import predict_memory
from flowrl.types import RewardOutput

pytestmark = pytest.mark.on_device

MOST_LINES = {nft: 28, awm: 25, dpo: 30, draft: 20, fpo: 35, adjoint: 45, tilt: 70}
GROUPS: dict[str, Any] = {"n_samples": 64, "batch_size": 32, "group_size": 8, "learning_rate": 1e-3}
OWN: dict[str, dict[str, Any]] = {"tilt:Tilt": {"pool": 64}, "dpo:DPO": {"batch_size": 16}}
NAMES = ("nft:NFT", "awm:AWM", "dpo:DPO", "draft:DRaFT", "fpo:FPO", "adjoint:AdjointMatching", "tilt:Tilt")


def make(name: str, env: Any = "gaussians-linear", **settings: Any) -> flowrl.FlowAlgorithm:
    cls = flowrl.algorithm_class(f"outside.{name}")
    return cls("FlowPolicy", env, seed=0, device=DEVICE, **{**GROUPS, **OWN.get(name, {}), **settings})


def weights(model: flowrl.FlowAlgorithm) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.policy.parameters_of("current").values()]


@pytest.mark.parametrize("module", MOST_LINES, ids=lambda module: module.__name__)
def test_they_are_short_and_use_public_names_only(module: Any) -> None:
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert code_lines(source) <= MOST_LINES[module]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flowrl"):
            assert node.module.startswith("flowrl.functional."), node.module
        elif isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= {"flowrl", "torch"}


@pytest.mark.parametrize("name", NAMES)
def test_each_raises_its_reward(name: str) -> None:
    iterations = 3 if name == "draft:DRaFT" else 12
    model = make(name, n_samples=256, batch_size=128).learn(256 * iterations)
    result = flowrl.evaluate(model, n_samples=512)
    assert result.reward_mean > result.reference.reward_mean + 0.15


@pytest.mark.parametrize("name", ["adjoint:AdjointMatching", "tilt:Tilt"])
def test_those_with_an_exact_optimum_come_near_it(name: str) -> None:
    model = make(name, n_samples=256, batch_size=128, n_epochs=2, **{"tilt:Tilt": {"pool": 1024}}.get(name, {}))
    model.learn(256 * 20)
    result = flowrl.evaluate(model, n_samples=1024)
    assert result.w2_to_optimum < 0.25 * result.reference.w2_to_optimum


@pytest.mark.parametrize("name", NAMES)
def test_each_resumes_exactly(name: str, tmp_path: Path) -> None:
    model = make(name, refresh_every=2, ema_decay=0.9)
    model.learn(2 * 64)
    model.save(tmp_path / "saved")
    model.learn(2 * 64, reset_num_timesteps=False)
    again = type(model).load(tmp_path / "saved", device=DEVICE)
    again.learn(2 * 64, reset_num_timesteps=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(again)))
    ours, theirs = (m.extra_state.state() for m in (model, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert again.policy.evaluations == model.policy.evaluations


class Refuses:
    """A reward, the first coordinate, that fails for samples far to the right."""

    def __call__(self, samples: torch.Tensor, contexts: Any) -> RewardOutput:
        if bool((samples[:, 0] > 2).any()):
            raise ValueError("too far right")
        return RewardOutput(samples[:, 0])


@pytest.mark.parametrize("name", NAMES)
def test_each_survives_a_reward_that_fails_for_some(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever belongs to a sample stays with it, and none that failed is learnt from."""
    env = flowrl.make("gaussians-linear")
    env.reward = Refuses()  # type: ignore[method-assign]
    model = make(name, env, on_reward_error="drop", max_dropped=0.9)
    cls, drawn = type(model), []
    if model.learns_from != "contexts":
        draw = cls.draw
        monkeypatch.setattr(cls, "draw", lambda self, ids: drawn.append(draw(self, ids)) or drawn[-1])
    model.learn(64)
    assert all(bool(w.isfinite().all()) for w in weights(model))
    assert 0 < model.n_dropped < 64
    if model.learns_from == "contexts":
        assert model.last_logged["rollout/reward_max"] <= 2
        return
    ((x_1, rows),) = drawn
    kept = model.buffer.all()
    assert kept.x_1[:, 0].max() <= 2
    origin = (kept.x_1[:, None] == x_1[None]).all(-1).float().argmax(1)
    for key, row in rows.items():
        assert torch.equal(kept.extra[key], row[origin]), key


@pytest.mark.parametrize("name", NAMES)
def test_each_can_be_tried_dry(name: str) -> None:
    model = make(name)
    plan = predict_memory(type(model), model.config, model.env.core)
    assert plan.missing == ""
    assert plan.phases["training"] > plan.parts["frozen weights"]


@pytest.mark.parametrize("name", ["draft:DRaFT", "adjoint:AdjointMatching"])
def test_gradients_of_rewards_flow_through_a_pipeline(name: str) -> None:
    env = flowrl.make("sd3-aesthetic", flow="mini-sd3")
    settings = {"n_samples": 8, "batch_size": 4, "group_size": 2, "rollout_steps": 4, "lora_rank": 4}
    own = {"draft:DRaFT": {"grad_steps": 2}}.get(name, {})
    model = make(name, env, **settings, **own, ema_decay=0.0, warmup_updates=0)
    before = weights(model)
    model.learn(8)
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(model)))
    assert model.last_logged["train/grad_norm"] > 0
    assert {"rollout/reward_mean", "rollout/diversity"} <= model.last_logged.keys()


@pytest.mark.parametrize("name", ["draft:DRaFT", "adjoint:AdjointMatching"])
def test_a_reward_without_gradient_is_named(name: str) -> None:
    env = flowrl.make("sd3-count", flow="mini-sd3")
    model = make(name, env, n_samples=2, batch_size=2, group_size=2, rollout_steps=4)
    with pytest.raises(ConfigError, match=r"needs the gradient of the reward.*'sd3-count' has none.*differentiable"):
        model.learn(2)


def test_draft_is_the_derivative_through_a_linear_flow() -> None:
    """Linear reward a, Euler steps of `v = W x + b`: the derivative by b through the last K is h sum (I + h W)^i a."""
    env = flowrl.make("gaussians-linear")
    steps, w = 4, torch.tensor([[0.3, -0.2], [0.1, 0.4]])

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(2))

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x @ w.T + self.bias

    from flowrl.envs.gaussians import GaussiansEnv

    flow_env = GaussiansEnv(env.mixture, env.reward_function, flow=Linear)
    for k in (1, 3, 4):
        model = make("draft:DRaFT", flow_env, n_samples=8, batch_size=8, rollout_steps=steps, grad_steps=k)
        loss, _ = model.loss(flowrl.Batch.of(torch.zeros(8, 0), torch.zeros(8, dtype=torch.long)))
        (gradient,) = torch.autograd.grad(loss, model.policy.model.network.bias)
        one_step = torch.eye(2) + w / steps
        expected = sum((torch.linalg.matrix_power(one_step, i).T @ torch.tensor([1.0, 0.0])) / steps for i in range(k))
        torch.testing.assert_close(-gradient, expected, atol=1e-5, rtol=1e-5)


def test_held_out_rewards_leave_methods_that_draw_in_their_updates_alone() -> None:
    callback = HeldOutCallback({"x": lambda samples, contexts: RewardOutput(samples[:, 0])}, every=1)
    make("draft:DRaFT").learn(64, callback=callback)
