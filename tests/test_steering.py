"""Steering whose samples have a law, or an optimum, that can be computed (best-of-n and SMC: test_baselines.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE

import flowrl
from flowrl.envs.gaussians import GaussianMixture, GaussiansEnv, LinearReward
from flowrl.errors import ConfigError
from flowrl.evaluate import EvaluateConfig
from flowrl.evaluation.steering import Steering, steer
from flowrl.types import RewardOutput

pytestmark = pytest.mark.on_device

MEAN, VARIANCE = 0.4, 0.5


def one_gaussian() -> GaussiansEnv:
    """N(0.4, 0.5) with its exact field, and reward x."""
    return GaussiansEnv(GaussianMixture([[MEAN]], [[VARIANCE]]), LinearReward((1.0,)))


def policy_of(env: Any, steps: int) -> Any:
    return flowrl.ORWCFM("FlowPolicy", env, seed=0, device=DEVICE, rollout_steps=steps).policy


def steered(env: Any, steering: Steering, n: int, steps: int) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(3)
    return steer(policy_of(env, steps), env, steering, torch.zeros(n, dtype=torch.long), generator)


def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    slope = (t * VARIANCE - (1 - t)) / (t**2 * VARIANCE + (1 - t) ** 2)
    return slope * (x - t * MEAN) + MEAN


def estimate(x: torch.Tensor, t: float) -> torch.Tensor:
    return x + (1 - t) * velocity(x, t)


def proposal(x: torch.Tensor, k: int, a: float) -> tuple[torch.Tensor, float]:
    """Mean and standard deviation of the estimate after a noisy step from x at time k / 3, which are known by hand."""
    t, h = k / 3, 1 / 3
    square = a**2 * (1 - t) / t if k else a**2 / h
    mean = x + h * velocity(x, t) + h * square / 2 * (t * velocity(x, t) - x) / (1 - t)
    std = (h * square) ** 0.5
    slope = estimate(torch.ones(()), t + h) - estimate(torch.zeros(()), t + h)
    return estimate(mean, t + h), (slope * std).item()


def law_of_rbf(y: torch.Tensor, n: int, a: float) -> torch.Tensor:
    """P(sample <= y) (M,) of three steps, two of them noisy, by quadrature over x_0 and the proposal taken.

    The first step takes the first of its n proposals that beats the estimate at x_0, the j-th, or else the best of all.
    The second takes the best of the 2 n - j, or n, that are left.
    """
    x_0 = torch.linspace(-5, 5, 201, dtype=torch.float64)
    z = torch.linspace(-6, 6, 2401, dtype=torch.float64)
    density, below = (-(z**2) / 2).exp() / (2 * torch.pi) ** 0.5, torch.special.ndtr(z)
    mean, std = proposal(x_0, 0, a)
    e = mean[:, None] + std * z  # (x_0, z): estimate of a proposal
    intercept = estimate(torch.zeros((), dtype=torch.float64), 1 / 3)
    state = (e - intercept) / (estimate(torch.ones((), dtype=torch.float64), 1 / 3) - intercept)
    best = estimate(x_0, 0.0)
    fails = torch.special.ndtr((best - mean) / std)[:, None]
    beats = e > best[:, None]
    mean_2, std_2 = proposal(state, 1, a)
    law = []
    for value in y:
        least = torch.special.ndtr((value - mean_2) / std_2)
        accepted = sum(fails ** (j - 1) * least ** (2 * n - j) for j in range(1, n + 1))
        taken = torch.where(beats, accepted, n * below ** (n - 1) * least**n)
        inner = torch.trapezoid(density * taken, z, dim=1)
        law.append(torch.trapezoid((-(x_0**2) / 2).exp() / (2 * torch.pi) ** 0.5 * inner, x_0))
    return torch.stack(law)


@pytest.mark.parametrize("n", [1, 3])
def test_rbf_has_the_law_of_its_rules(n: int) -> None:
    level = 0.7
    samples = steered(one_gaussian(), Steering("rbf", n, noise_level=level), 20_000, 3).double().flatten()
    y = torch.linspace(-1.5, 2.5, 41, dtype=torch.float64)
    found = (samples[:, None] <= y).double().mean(0)
    assert (found - law_of_rbf(y, n, level)).abs().max() < 0.015


def test_rbf_with_one_proposal_is_the_sde() -> None:
    samples = steered(one_gaussian(), Steering("rbf", 1), 20_000, 60)
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert samples.var().item() == pytest.approx(VARIANCE, abs=0.04)


class Counting:
    """Reward of so many calls, each with as many samples as came."""

    def __init__(self, rewards: list[float]) -> None:
        self.rewards, self.calls = rewards, 0

    def __call__(self, samples: torch.Tensor, contexts: Any) -> RewardOutput:
        self.calls += 1
        return RewardOutput(torch.full((len(samples),), self.rewards[min(self.calls, len(self.rewards)) - 1]))


def test_what_a_step_leaves_rolls_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 proposals a step: the first beats 0 at once; of the next 7 and 4 none beats 1; the last step has 4 again."""
    env, policy, times = one_gaussian(), policy_of(one_gaussian(), 5), []
    env.reward = Counting([0.0, 1.0] + [0.5] * 7 + [0.7] * 20)  # type: ignore[method-assign]
    velocity_of = policy.networks.velocity
    monkeypatch.setattr(
        policy.networks, "velocity", lambda x, t, *a: times.append(round(5 * t.item())) or velocity_of(x, t, *a)
    )
    steer(policy, env, Steering("rbf", 4), torch.zeros(1, dtype=torch.long), torch.Generator(DEVICE).manual_seed(3))
    assert times == [0] + [1] + 7 * [2] + 4 * [3] + 4 * [4]


@pytest.mark.parametrize(("reward", "linear"), [("linear", True), ("constant", False)])
def test_the_cost_of_rbf_is_that_of_its_budget(reward: str, linear: bool) -> None:
    env = one_gaussian()
    if not linear:
        env.reward = lambda samples, contexts: RewardOutput(torch.ones(len(samples)))  # type: ignore[method-assign]
    result = flowrl.evaluate(policy_of(env, 6), env, n_samples=64, steering=Steering("rbf", 3))
    assert result.evaluations_per_sample == 1 + 3 * 5
    assert (result.reward_mean > result.reference.reward_mean + 0.5) == linear


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_d_flow_finds_the_best_noise(temperature: float) -> None:
    """x_1 = A x_0 + b and reward a . x: the optimum is along g = A^T a / T, (|g| + sqrt(|g|^2 + 4 D - 4)) / 2 long."""
    variances, mean, a, steps = torch.tensor([0.5, 2.0]), torch.tensor([0.4, -0.3]), torch.tensor([1.0, 0.5]), 5
    env = GaussiansEnv(GaussianMixture(mean[None], torch.diag(variances)), LinearReward((1.0, 0.5)))
    slope, end = torch.ones(2), torch.zeros(2)
    for t in torch.arange(steps) / steps:
        gain = (t * variances - (1 - t)) / (t**2 * variances + (1 - t) ** 2)
        slope, end = slope * (1 + gain / steps), end + (gain * (end - t * mean) + mean) / steps
    g = slope * a / temperature
    length = (g.norm() + (g.norm() ** 2 + 4).sqrt()) / 2
    samples = steered(env, Steering("d_flow", 300, temperature), 8, steps)
    torch.testing.assert_close(samples, (slope * length * g / g.norm() + end).expand(8, 2), atol=2e-3, rtol=0)


def test_d_flow_counts_its_cost_and_raises_the_reward() -> None:
    policy, env = policy_of("gaussians-quadratic", 10), flowrl.make("gaussians-quadratic")
    result = flowrl.evaluate(policy, env, n_samples=64, steering=Steering("d_flow", 20, 0.1))
    assert result.evaluations_per_sample == (4 * 20 + 1) * 10
    assert result.reward_mean > result.reference.reward_mean + 1


def test_d_flow_needs_the_gradient_of_the_reward() -> None:
    policy, env = policy_of("sd3-count", 2), flowrl.make("sd3-count")
    with pytest.raises(ConfigError, match=r"'d_flow' needs the gradient of the reward.*'sd3-count' has none"):
        steer(policy, env, Steering("d_flow", 1), torch.zeros(2, dtype=torch.long), torch.Generator(DEVICE))


@pytest.mark.parametrize(("method", "name"), [("rbf", "sd3-count"), ("d_flow", "sd3-aesthetic")])
def test_pictures_are_steered_with_guidance(method: Any, name: str) -> None:
    policy, env, contexts = policy_of(name, 3), flowrl.make(name), torch.tensor([3, 1, 2])
    generator = torch.Generator(DEVICE).manual_seed(0)
    x_1 = steer(policy, env, Steering(method, 2), contexts, generator, guidance_scale=2.0)
    assert x_1.shape == (3, *policy.model.latent_shape)
    assert not x_1.requires_grad
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_what_cannot_be_steered_is_named() -> None:
    env, ids = one_gaussian(), torch.zeros(2, dtype=torch.long)
    policy, generator = policy_of(env, 3), torch.Generator(DEVICE)
    for method in ("smc", "rbf"):
        with pytest.raises(ConfigError, match=f"'{method}' takes Euler steps of the SDE, not 'heun'"):
            steer(policy, env, Steering(method), ids, generator, solver="heun")  # type: ignore[arg-type]
    env.groupwise = True
    with pytest.raises(ConfigError, match="compares samples of the same context, and rbf asks for each by itself"):
        steer(policy, env, Steering("rbf"), ids, generator)
    with pytest.raises(ConfigError, match="step_size"):
        Steering("d_flow", step_size=0.0)
    with pytest.raises(ConfigError, match="one of best_of_n, smc, rbf, d_flow, not"):
        Steering("magic")  # type: ignore[arg-type]


def test_settings_of_steering_without_steering_are_refused() -> None:
    for given in ({"steer_n": 4}, {"steer_temperature": 0.5}, {"steer_step_size": 0.2}):
        with pytest.raises(ConfigError, match=f"--{next(iter(given)).replace('_', '-')} goes with --steer"):
            EvaluateConfig(**given)


@pytest.mark.parametrize(
    ("method", "idle"),
    [
        ("best_of_n", ("temperature", "noise_level", "ess_threshold", "step_size")),
        ("smc", ("step_size",)),
        ("rbf", ("temperature", "ess_threshold", "step_size")),
        ("d_flow", ("noise_level", "ess_threshold")),
    ],
)
def test_settings_of_another_steering_are_refused(method: Any, idle: tuple[str, ...]) -> None:
    for name in ("temperature", "noise_level", "ess_threshold", "step_size"):
        if name not in idle:
            assert getattr(Steering(method, **{name: 0.25}), name) == 0.25
            continue
        with pytest.raises(ConfigError, match=f"{name} does nothing for steering '{method}'"):
            Steering(method, **{name: 0.25})


def test_a_trained_flow_that_is_steered_has_no_drift_in_its_table() -> None:
    model = flowrl.ORWCFM("FlowPolicy", "gaussians-linear", seed=0, device="cpu", n_samples=32, rollout_steps=2)
    model.learn(32)
    table = flowrl.evaluate(model, n_samples=16, steering=Steering("best_of_n", n=2)).table()
    assert "nan" not in table
    assert "\neffective sample share: " in table
