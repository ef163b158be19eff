"""Methods that follow the gradient of the reward, against derivatives that are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE

import flowrl
from flowrl.envs.base import GenerationEnv
from flowrl.envs.gaussians import GaussianMixture
from flowrl.errors import ConfigError, RewardError
from flowrl.models.loading import source_of
from flowrl.run import main
from flowrl.runs.plan import head_of
from flowrl.training.memory_plan import predict_memory
from flowrl.training.records import log_iteration
from flowrl.types import Batch, RewardOutput

pytestmark = pytest.mark.on_device
W, A = -0.7, torch.tensor([2.0, -1.0])


class Linear(torch.nn.Module):
    """v = W x + shift."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return W * x + self.shift


class LinearEnv(GenerationEnv):
    """r = a . x."""

    def __init__(self) -> None:
        super().__init__(source_of(Linear, (2,)), [None], low=-99, high=99, name="linear")

    def reward(self, samples: torch.Tensor, contexts: Any) -> RewardOutput:
        return RewardOutput(samples @ A.to(samples.device))


def made(cls: type[Any], **settings: Any) -> Any:
    return cls(
        "FlowPolicy", LinearEnv(), seed=0, device=DEVICE, n_samples=16, batch_size=16, rollout_steps=8, **settings
    )


def gradient(model: Any) -> torch.Tensor:
    ids = torch.zeros(16, dtype=torch.long, device=DEVICE)
    loss, _ = model.loss(Batch.of(torch.zeros(16, 0, device=DEVICE), ids))
    loss.backward()
    return model.policy.model.network.shift.grad


@pytest.mark.parametrize("k", [1, 3, 8])
def test_draft_is_the_derivative_of_the_last_steps(k: int) -> None:
    h = 1 / 8
    expected = sum((1 + h * W) ** j * h for j in range(k)) * A
    torch.testing.assert_close(gradient(made(flowrl.DRaFT, grad_steps=k)), -expected)


@pytest.mark.parametrize(("late_share", "late"), [(0.25, [6, 7]), (0.05, [7]), (1.0, list(range(8)))])
def test_refl_is_the_derivative_of_the_estimate(late_share: float, late: list[int]) -> None:
    """It is `(1 - t) a`, at the times of the last steps, each with the sampler's state there."""
    model = made(flowrl.ReFL, late_share=late_share)
    ids = torch.zeros(400, dtype=torch.long)
    model.generator.manual_seed(1)
    x_1 = model.followed(ids)
    (gradient,) = torch.autograd.grad((x_1 @ A).mean(), model.policy.model.network.shift)
    model.generator.manual_seed(1)
    x_t, t = model.late_states(ids)
    assert (8 * t).unique().tolist() == late
    torch.testing.assert_close(gradient, (1 - t).mean() * A)
    torch.testing.assert_close(x_1, x_t * (1 + (1 - t[:, None]) * W))
    model.generator.manual_seed(1)
    x_0 = model.policy.noise(400, model.generator)
    torch.testing.assert_close(x_t, x_0 * (1 + W / 8) ** (8 * t[:, None]))


@pytest.mark.parametrize("name", ["adjoint", "draft", "refl"])
def test_a_dry_run_asks_no_reward(name: str) -> None:
    model = made(flowrl.algorithm_class(name))
    env = LinearEnv()
    env.reward = None  # type: ignore[assignment,method-assign]
    assert predict_memory(type(model), model.config, env).missing == ""


def test_a_dry_run_says_where_there_is_no_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--algo", "draft", "--env", "plan-pendulum", "--env.simulator", "gymnasium", "--dry-run"]) == 2
    assert "the reward of 'plan-pendulum' has none" in capsys.readouterr().err


@pytest.mark.parametrize("cls", [flowrl.DRaFT, flowrl.ReFL])
def test_the_penalty_pulls_to_the_reference(cls: type[Any]) -> None:
    free, held = made(cls), made(cls, alpha=3.0)
    for model in (free, held):
        with torch.no_grad():
            model.policy.model.network.shift.copy_(torch.tensor([0.5, 0.25]))
        model.generator.manual_seed(7)
    # |v - v_ref|^2, mean over two dimensions, is |shift|^2 / 2
    torch.testing.assert_close(gradient(held) - gradient(free), 3.0 * torch.tensor([0.5, 0.25]))


@pytest.mark.parametrize("name", ["draft", "refl", "adjoint"])
def test_a_reward_that_takes_no_tensor_with_a_graph_is_refused(name: str) -> None:
    """Before anything is drawn; one that has no graph to give is tried for every algorithm (test_contract.py)."""
    env = LinearEnv()
    env.reward = lambda samples, contexts: RewardOutput(torch.from_numpy(samples.cpu().numpy()[:, 0]))  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=f"'{name}' needs the gradient of the reward by the samples"):
        flowrl.algorithm_class(name)("FlowPolicy", env, seed=0, device=DEVICE)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="grad_steps must be from 1 to rollout_steps = 8, not 9"):
        made(flowrl.DRaFT, grad_steps=9)
    with pytest.raises(ConfigError, match="late_share must be in"):
        made(flowrl.ReFL, late_share=0.0)
    with pytest.raises(ConfigError, match="alpha must not be negative"):
        made(flowrl.ReFL, alpha=-1.0)
    for cls in (flowrl.DRaFT, flowrl.ReFL):
        with pytest.raises(ConfigError, match="states no tilt that it aims at with these settings: leave"):
            made(cls, target_lambda=1.0)


MEAN, VARIANCE, SLOPE = 0.4, 0.5, 1.5
GAUSSIAN = GaussianMixture([[MEAN]], [[[VARIANCE]]])


class GaussianFlow(torch.nn.Module):
    """The velocity of a Gaussian in one dimension, and what is learnt beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.shift = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.scale * GAUSSIAN.velocity(t, x) + self.shift


class GaussianEnv(GenerationEnv):
    """r = SLOPE x."""

    def __init__(self, network: type[torch.nn.Module] = GaussianFlow) -> None:
        super().__init__(source_of(network, (1,)), [None], low=-99, high=99, name="gaussian")

    def reward(self, samples: torch.Tensor, contexts: Any) -> RewardOutput:
        return RewardOutput(SLOPE * samples[:, 0])


def matching(**settings: Any) -> Any:
    return flowrl.AdjointMatching(
        "FlowPolicy", GaussianEnv(), seed=0, device=DEVICE, **{"n_samples": 16, "batch_size": 16, **settings}
    )


def drawn(model: Any) -> Batch:
    ids = torch.zeros(16, dtype=torch.long, device=DEVICE)
    x_1, rows = model.draw(ids)
    return Batch.of(x_1, ids)._replace(extra=rows)


def controls(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Times of the noisy steps, and `-eta a` there, which no sample changes: the flow and the reward are linear."""
    t, adjoints = model.policy.times()[1:-2], drawn(model).extra["adjoints"].squeeze(-1)
    torch.testing.assert_close(adjoints, adjoints[:1].expand_as(adjoints))
    return t, -(1 - t) / t * model.config.tau * adjoints[0]


def test_the_lean_adjoint_gives_the_velocity_of_the_tilt() -> None:
    """On a fine grid, with an error of first order: half of it with twice the steps, next to none extrapolated."""
    t, coarse = controls(matching(rollout_steps=200, tau=2.0))
    fine = controls(matching(rollout_steps=400, tau=2.0))[1][1:-1:2]
    x = torch.full((len(t), 1), 0.3)
    tilted = GAUSSIAN.tilt(2.0, linear=(SLOPE,))
    expected = (tilted.velocity(t, x) - GAUSSIAN.velocity(t, x))[:, 0]
    assert (fine - expected).abs().max() < 0.55 * (coarse - expected).abs().max() < 0.1 * expected.abs().max()
    torch.testing.assert_close(2 * fine - coarse, expected, rtol=0, atol=4e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(("steps", "share"), [(10, 0.681), (20, 0.836), (40, 0.917), (400, 0.992)])
def test_few_steps_give_less_than_the_tilt(steps: int, share: float) -> None:
    """By the sampler of as many steps, where noise has no limit (in the first step) left alone."""
    model = matching(rollout_steps=steps)
    _, control = controls(model)
    moved, x = (torch.full((1, 1), 0.2) for _ in range(2))
    for k, t in enumerate(model.policy.times()[:-1].cpu()):
        x = x + GAUSSIAN.velocity(t, x) / steps
        added = control[k - 1] if 0 < k < steps - 1 else 0.0
        moved = moved + (GAUSSIAN.velocity(t, moved) + added) / steps
    assert float(moved - x) / (SLOPE * VARIANCE) == pytest.approx(share, abs=0.001)


def test_adjoints_belong_to_the_reference() -> None:
    """Whatever the flow in training is by now."""
    model = matching(rollout_steps=10)
    _, before = controls(model)
    with torch.no_grad():
        model.policy.model.network.scale.fill_(1.5)
    torch.testing.assert_close(controls(model)[1], before)


def test_adjoint_matching_is_a_regression_on_the_controls() -> None:
    model = matching(rollout_steps=10, tau=0.7, times_per_path=8)
    t, control = controls(model)
    eta, network = (1 - t) / t, model.policy.model.network
    loss, figures = model.loss(drawn(model))  # every noisy time of every path
    loss.backward()
    torch.testing.assert_close(loss.detach(), (control.square() / eta).mean())
    torch.testing.assert_close(network.shift.grad[0], (-2 * control / eta).mean())
    assert figures["drift"] == 0
    with torch.no_grad():
        network.shift.fill_(0.5)
    torch.testing.assert_close(model.loss(drawn(model))[0].detach(), ((0.5 - control).square() / eta).mean())


def test_times_of_a_path_differ() -> None:
    model = matching(rollout_steps=6, times_per_path=2)
    batch, seen = drawn(model), []
    velocity = model.policy.velocity
    model.policy.velocity = lambda x, t, *rest, **kwargs: seen.append(t) or velocity(x, t, *rest, **kwargs)
    for _ in range(20):
        model.loss(batch)
    times = torch.stack(seen).reshape(-1, 16, 2)
    assert (times[..., 0] != times[..., 1]).all()
    assert set(times.flatten().tolist()) == set(model.policy.times()[1:-2].tolist())


def test_adjoint_matching_trains_to_the_tilt() -> None:
    model = flowrl.AdjointMatching(
        "FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, n_samples=256, batch_size=128, n_epochs=4,
        rollout_steps=20, learning_rate=2e-3, lr_schedule="linear",
    ).learn(256 * 16)  # fmt: skip
    result = flowrl.evaluate(model, n_samples=512)
    assert result.w2_to_optimum < 0.35 * result.reference.w2_to_optimum  # 0.12 to 0.24 over sixteen runs


def test_only_adjoint_matching_states_a_tilt() -> None:
    spread = torch.tensor(3.0)
    assert float(matching(tau=0.7).tilt_of(spread)) == pytest.approx(0.7)
    guided = matching()
    guided.config = replace(guided.config, guidance_scale=2.0)
    assert guided.tilt_of(spread) is None
    assert all(made(cls).tilt_of(spread) is None for cls in (flowrl.DRaFT, flowrl.ReFL))
    aimed, told = (matching(rollout_steps=4, **settings) for settings in ({"target_lambda": 2.0}, {"tau": 2.0}))
    for model in (aimed, told):
        model.learn(16)  # with adjoints that were drawn before the aim was taken
    assert aimed.config.tau == pytest.approx(2.0)
    torch.testing.assert_close(aimed.policy.model.network.shift, told.policy.model.network.shift)
    assert aimed.last_logged["train/loss"] == pytest.approx(told.last_logged["train/loss"])


def test_times_that_stand_at_noise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    halting = lambda self, steps: torch.cat([torch.zeros(1), torch.linspace(0, 1, steps)])  # noqa: E731
    monkeypatch.setattr(flowrl.VelocityModel, "times", halting)
    with pytest.raises(ConfigError, match=r"divides by t and 1 - t .* times are 0, 0, 0.333, 0.667, 1\."):
        matching(rollout_steps=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 0.0}, "tau must be positive"),
        ({"solver": "heun"}, "takes Euler steps, not 'heun'"),
        ({"rollout_steps": 2}, "at least 3: the first step has no noise, which is infinite at t = 0"),
        ({"rollout_steps": 6, "times_per_path": 5}, "from 1 to the 4 noisy steps, not 5"),
        ({"times_per_path": 0}, "not 0"),
    ],
    ids=str,
)
def test_settings_that_adjoint_matching_cannot_have(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        matching(**settings)


@pytest.mark.parametrize("name", ["draft", "orw_w2"])
def test_plan_and_speed_count_every_sample_that_is_drawn(name: str, tmp_path: Path) -> None:
    """Where contexts are learnt from, each pass draws anew."""
    settings: dict[str, Any] = {"n_samples": 32, "batch_size": 16, "n_epochs": 2, "rollout_steps": 2}
    model = flowrl.algorithm_class(name)("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, **settings)
    head = head_of(model, tmp_path, 128)
    model.learn(128)
    plan = f"plan: {model.iteration} iterations of {128 // model.iteration} samples (128 samples), {model._n_updates} "
    assert plan + "gradient steps" in head
    log_iteration(model, {"drift": torch.zeros(())}, seconds=2.0)
    assert model.last_logged["time/samples_per_second"] == 128 / model.iteration / 2.0


@pytest.mark.parametrize("name", ["draft", "refl"])
def test_samples_left_out_are_a_share_of_all_that_were_drawn(name: str) -> None:
    """Of every pass, which draws its own."""
    env = LinearEnv()
    env.reward = lambda samples, contexts: RewardOutput(  # type: ignore[method-assign]
        torch.where(samples[:, 0] > 0.4, torch.nan, samples @ A.to(samples.device))
    )
    settings = {"n_samples": 16, "batch_size": 16, "n_epochs": 4, "rollout_steps": 4, "on_reward_error": "drop"}

    def left_out(most: float) -> int:
        model = flowrl.algorithm_class(name)("FlowPolicy", env, seed=0, device=DEVICE, max_dropped=most, **settings)
        return model.learn(64).n_dropped

    share = left_out(0.95) / 64
    assert share > 0.1
    assert left_out(share) == 64 * share
    with pytest.raises(RewardError, match=r"failed for \d+ of 64 samples of an iteration"):
        left_out(0.9 * share)


def test_components_are_means_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which each may have left out another number of samples; here another one has one sample more."""
    env = LinearEnv()

    def reward(samples: torch.Tensor, contexts: Any) -> RewardOutput:
        values = samples @ A.to(samples.device)
        return RewardOutput(values, {"same": values})

    env.reward = reward  # type: ignore[method-assign]
    model = flowrl.DRaFT("FlowPolicy", env, seed=0, device=DEVICE, n_samples=16, batch_size=16, rollout_steps=4)
    monkeypatch.setattr(model.ranks, "gather_uneven", lambda rows: torch.cat([rows, rows[:1] + 100]))
    model.learn(16)
    assert model.last_logged["reward/same"] == pytest.approx(model.last_logged["rollout/reward_mean"], rel=1e-5)
