"""Endpoint methods against their rows of one table: exact minimisers, closed forms, and what moves nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE
from test_graphs import Tape, assert_same, trained

import flowrl
from flowrl.envs.gaussians import GaussianMixture, GaussiansEnv, LinearReward
from flowrl.errors import ConfigError, NonFiniteError
from flowrl.functional import endpoint
from flowrl.functional.flow import interpolate
from flowrl.functional.losses import clipped_objective, residual_weighted_loss, reward_weighted_loss, squared_errors
from flowrl.training import graphs
from flowrl.types import Batch, Pair

pytestmark = pytest.mark.on_device

FAMILY = ("adrpo", "awm", "nft", "ram", "rvm")
MIXTURE = GaussianMixture([[-1.0], [1.5]], [[[0.3]], [[0.2]]], [0.4, 0.6])
BINS = 24


def make(name: str, env: Any = "gaussians-linear", **settings: Any) -> Any:
    """With the algorithm's own defaults, whatever the environment recommends."""
    cls = flowrl.algorithm_class(name)
    config = cls.Config(**{"n_samples": 64, "batch_size": 64, "rollout_steps": 4, **settings})
    return cls("FlowPolicy", env, config=config, seed=0, device=DEVICE)


class Expectations:
    """Samples of a mixture noised to one time, in bins of x_t; and means over the bins, as if they were given x_t."""

    def __init__(self, t: float, n: int = 100_000) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.x_1 = MIXTURE.sample(n, generator).double()
        x_0 = torch.randn(n, 1, generator=generator, device=DEVICE).double()
        self.t = self.x_1.new_full((n,), t)
        self.x_t, self.u = interpolate(x_0, self.x_1, self.t)
        self.bins = torch.bucketize(self.x_t[:, 0], torch.linspace(-1.0, 1.2, BINS - 1, device=DEVICE)).long()
        self.v = {  # of the roles, constant in each bin
            role: self.mean(MIXTURE.velocity(self.t, self.x_t)) + shift
            for role, shift in (("behaviour", 0.0), ("reference", 0.4), ("ema", -0.2))
        }

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        total = values.new_zeros(BINS, *values.shape[1:]).index_add_(0, self.bins, values)
        count = torch.bincount(self.bins, minlength=BINS).to(values)
        return total / count.reshape(-1, *[1] * (values.dim() - 1))


def minimiser(model: Any, given: Expectations, advantage: torch.Tensor) -> torch.Tensor:
    """Where the gradient of an algorithm's own loss is zero in each bin (BINS, 1); it is affine in v."""
    n, inside = len(given.x_1), {}
    rows = torch.arange(n, device=DEVICE)
    batch = Batch(given.x_1, torch.zeros_like(rows), advantage, advantage, rows)
    model.noised = lambda batch: (batch, Pair(given.x_t - given.t[:, None] * given.u, given.t, given.x_t, given.u, ()))
    model.velocity = lambda pair, role="current": (inside["v"] if role == "current" else given.v[role])[given.bins]

    def gradient(value: float) -> torch.Tensor:
        inside["v"] = torch.full((BINS, 1), value, dtype=torch.double, device=DEVICE, requires_grad=True)
        loss, _ = model.loss(batch)
        return torch.autograd.grad(loss, inside["v"])[0]

    at_zero, at_one = gradient(0.0), gradient(1.0)
    assert ((at_one - at_zero) > 0).all()  # a minimum, not only a zero
    return -at_zero / (at_one - at_zero)


def advantages(given: Expectations, size: float) -> torch.Tensor:
    a = (given.x_1[:, 0] - given.x_1.mean()).clamp(-1, 1) * size
    return a - a.mean() / 2  # not centred, on purpose


Formula = Callable[[Expectations, torch.Tensor], torch.Tensor]


def around(base: str, gain: float, held: dict[str, float]) -> Formula:
    """`sum of anchors held + gain E[A (u - v_base)]`, over the sum of the anchors' gains."""

    def formula(e: Expectations, a: torch.Tensor) -> torch.Tensor:
        pull = e.mean(a[:, None] * e.u) - e.mean(a[:, None]) * e.v[base]
        return (sum(b * e.v[role] for role, b in held.items()) + gain * pull) / sum(held.values())

    return formula


def signed(gain: float, held: dict[str, float]) -> Formula:
    """`(gain E[A u] + anchors) / (gain E[A] + their gains)`."""

    def formula(e: Expectations, a: torch.Tensor) -> torch.Tensor:
        top = gain * e.mean(a[:, None] * e.u) + sum(b * e.v[role] for role, b in held.items())
        return top / (gain * e.mean(a[:, None]) + sum(held.values()))

    return formula


CASES: dict[str, tuple[str, dict[str, Any], float, Formula]] = {
    "nft": ("nft", {"beta": 0.7, "beta_ref": 0.0}, 2.0, around("behaviour", 1 / 5, {"behaviour": 0.7})),
    "nft with its reference": (
        "nft",
        {"beta": 0.7, "beta_ref": 0.3, "max_advantage": 4.0},
        2.0,
        around("behaviour", 1.0, {"behaviour": 4 * 0.7, "reference": 0.3}),
    ),
    "nft as in the paper": (
        "nft",
        {"beta": 0.5, "beta_ref": 0.2, "max_advantage": 4.0, "scale_by_clip": False},
        2.0,
        around("behaviour", 1 / 4, {"behaviour": 0.5, "reference": 0.2}),
    ),
    "nft, x1_hat": (
        "nft",
        {"beta": 0.5, "beta_ref": 0.2, "error": "x1_hat"},
        2.0,
        around("behaviour", 0.7**2, {"behaviour": 5 * 0.5 * 0.7**2, "reference": 0.2}),
    ),
    "adrpo": ("adrpo", {"beta": 2.5}, 2.0, around("reference", 1.0, {"reference": 2.5})),
    "ram": ("ram", {"strength": 1.3}, 2.0, around("behaviour", 1.3, {"reference": 1.0})),
    "ram, held v": (
        "ram",
        {"strength": 0.4, "base": "current", "max_advantage": 2.0},
        2.0,
        signed(0.4, {"reference": 1.0}),
    ),
    "awm": ("awm", {"beta_ref": 0.2, "beta_old": 0.9}, 4.0, signed(1 / 5, {"reference": 0.2, "behaviour": 0.9})),
    "awm without its reference": ("awm", {"beta_ref": 0.0}, 4.0, signed(1 / 5, {"behaviour": 1.0})),
    "rvm": ("rvm", {"beta_ref": 0.3, "beta_old": 0.6}, 2.0, signed(0.1, {"reference": 0.3, "behaviour": 0.6})),
    "rvm with its reference only": ("rvm", {"beta_ref": 0.8, "beta_old": 0.0}, 2.0, signed(0.1, {"reference": 0.8})),
}


@pytest.mark.parametrize("case", CASES)
def test_one_refresh_ends_at_the_minimiser_of_the_row(case: str) -> None:
    """Of the algorithm's own loss, against conditional expectations over the same samples: no sampling error."""
    name, settings, size, formula = CASES[case]
    given = Expectations(0.3, 20_000)
    model, a = make(name, **settings), advantages(given, size)
    expected = formula(given, a)
    if name == "nft" and a.abs().max() > model.config.max_advantage:
        raise AssertionError("this case is to be unclipped")
    torch.testing.assert_close(minimiser(model, given, a), expected, rtol=1e-9, atol=1e-9)
    assert (expected - given.v["behaviour"]).abs().max() > 0.05
    row = model.config.row()
    if model.name != "nft" or model.config.error == "velocity":
        from_table = row.minimiser(given.mean(a), given.mean(a[:, None] * given.u), given.v)
        torch.testing.assert_close(from_table, expected, rtol=1e-9, atol=1e-9)


class Knows:
    """A critic that knows the expected advantage in each bin."""

    def __init__(self, given: Expectations, a: torch.Tensor) -> None:
        self.value = given.mean(a)[given.bins]

    def regress(self, target: torch.Tensor, weight: object, *state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.value, torch.zeros(())


@pytest.mark.parametrize("name", FAMILY)
def test_a_critic_leaves_the_covariance_and_holds_every_row(name: str) -> None:
    """With E[A | x_t] taken off a refresh ends at the anchors plus gain Cov(A, u | x_t), whatever v_old and v are."""
    held = {"adrpo": {"beta": 1.5}, "awm": {"beta_ref": 0.2, "beta_old": 0.1}, "nft": {"beta_ref": 0.3}, "ram": {}}
    held["rvm"] = {"beta_ref": 0.05, "beta_old": 0.02}
    given = Expectations(0.3, 20_000)
    model, a = make(name, critic_learning_rate=1e-3, **held[name]), advantages(given, 1.8)
    model.critic = Knows(given, a)
    row = model.config.row()
    covariance = given.mean(a[:, None] * given.u) - given.mean(a[:, None]) * given.mean(given.u)
    pulled = sum(gain * given.v[role] for role, gain in row.anchors.items()) + row.gain * covariance
    torch.testing.assert_close(minimiser(model, given, a), pulled / sum(row.anchors.values()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", ["plain", "residual"])
def test_orw_w2_is_a_row(target: str) -> None:
    """The gradient of the loss that `orw_w2` computes, term by term, is that of the kernel."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    v, u, v_old, v_ref = torch.randn(4, 32, 3, generator=generator, dtype=torch.double, device=DEVICE)
    w, b = torch.rand(2, 32, generator=generator, dtype=torch.double, device=DEVICE)
    v.requires_grad_()
    alpha = torch.full_like(w, 0.7)
    velocities = {"current": v, "behaviour": v_old, "reference": v_ref}
    if target == "plain":
        loss = reward_weighted_loss(squared_errors(v, u, v_ref), w, alpha)
        row, coefficient = endpoint.ROWS["orw_w2 plain"](alpha), w
    else:
        loss = residual_weighted_loss(squared_errors(v, u, v_old, v_ref), w, b, alpha)
        row, coefficient = endpoint.ROWS["orw_w2 residual"](w, alpha), w - b
    own = endpoint.endpoint_loss(v, row.gradient(u, coefficient, velocities))
    expected, gradient = (torch.autograd.grad(value.sum(), v)[0] for value in (loss, own))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_the_loss_has_the_gradient_and_is_not_negative() -> None:
    v = torch.tensor([[1e4, -3.0], [0.5, 2.0]], device=DEVICE, requires_grad=True)
    gradient = torch.tensor([[1e-7, -2.0], [0.0, 0.3]], device=DEVICE)
    loss = endpoint.endpoint_loss(v, gradient)
    assert torch.equal(torch.autograd.grad(loss.sum(), v)[0], gradient)  # 2 g / D with D = 2, no rounding by v
    torch.testing.assert_close(loss, gradient.square().mean(1))
    row = endpoint.Row("current", {"reference": 0.5})
    velocities = {"current": v, "reference": torch.zeros_like(v)}
    weighted = row.gradient(v + 1, torch.full((2,), -3.0, device=DEVICE), velocities, torch.tensor([2.0, 0.5]).to(v))
    torch.testing.assert_close(
        weighted, (0.5 * v.detach() + 3) * torch.tensor([[2.0], [0.5]]).to(v), rtol=1e-6, atol=1e-5
    )


# closed forms: linear rewards on one Gaussian


MEAN, VARIANCE, SLOPE = 0.5, 0.8, 0.6
SHIFTS: dict[str, tuple[dict[str, Any], float]] = {
    "adrpo": ({"beta": 2.6, "max_advantage": 2.5}, 1 / 2.6),
    "awm": ({"beta_ref": 0.0, "beta_old": 1.0, "max_advantage": 2.5}, 1 / 2.5),
    "nft": ({"beta": 0.05, "beta_ref": 0.0, "max_advantage": 50.0}, 1 / 0.05 / 50),
    "ram": ({"strength": 0.9}, 0.9),
    "rvm": ({"gain": 0.2, "beta_old": 0.5, "max_advantage": 2.5}, 0.2 / 0.5),
}
"""Settings, and the gain of one refresh over its anchors, with a clip that advantages here do not reach."""


def gaussian_field(mean: float, variance: float, t: float, x: torch.Tensor) -> torch.Tensor:
    """Field (B, 1) of N(mean, variance) at x (B,)."""
    c = t**2 * variance + (1 - t) ** 2
    return (mean + (t * variance - (1 - t)) / c * (x - t * mean))[:, None]


class Given:
    """Expectations given x_t of samples of N(mean, variance), by quadrature."""

    def __init__(self, mean: float, variance: float, t: float) -> None:
        self.t, self.x_t = t, torch.linspace(-2, 2, 9, dtype=torch.double, device=DEVICE)
        c = t**2 * variance + (1 - t) ** 2
        z = torch.linspace(-8, 8, 801, dtype=torch.double, device=DEVICE)
        self.density = (-0.5 * z**2).exp() / (-0.5 * z**2).exp().sum()
        centre = mean + t * variance / c * (self.x_t - t * mean)
        self.x_1 = centre[:, None] + math.sqrt(variance / c) * (1 - t) * z
        self.u = (self.x_1 - self.x_t[:, None]) / (1 - t)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return (values * self.density).sum(1)

    def minimiser(self, row: endpoint.Row, a: torch.Tensor, v_old: torch.Tensor, v_ref: torch.Tensor) -> torch.Tensor:
        velocities = {"behaviour": v_old, "reference": v_ref}
        return row.minimiser(self.mean(a), self.mean(a * self.u)[:, None], velocities)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", FAMILY)
def test_a_linear_reward_moves_the_mean_by_gain_times_variance(name: str, t: float) -> None:
    """One refresh on N(m, S): the minimiser is the field of N(m + gain S a, S); over 1 + gain E[A | x_t] for those
    whose base is v itself."""
    settings, gain = SHIFTS[name]
    row = make(name, **settings).config.row()
    given = Given(MEAN, VARIANCE, t)
    a = SLOPE * (given.x_1 - MEAN)
    field = gaussian_field(MEAN, VARIANCE, t, given.x_t)
    moved = gaussian_field(MEAN + gain * VARIANCE * SLOPE, VARIANCE, t, given.x_t)
    if row.base == "current":
        moved = field + (moved - field) / (1 + gain * given.mean(a)[:, None])
    torch.testing.assert_close(given.minimiser(row, a, field, field), moved, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FAMILY)
def test_training_one_refresh_moves_the_mean(name: str) -> None:
    """The whole loop on N(m, S), samples of the reference throughout; its group's mean takes 1 / 8 off a reward."""
    settings, gain = SHIFTS[name]
    env = GaussiansEnv(GaussianMixture([[MEAN]], [[VARIANCE]]), LinearReward((SLOPE,)))
    fit = {"n_samples": 1024, "batch_size": 256, "rollout_steps": 10, "solver": "midpoint", "learning_rate": 2e-3}
    model = make(name, env, **fit, **settings, spread="none", refresh_every=10**6, ema_decay=0.98, noisings=2)
    model.learn(15 * 1024)
    shift = model.policy.sample(n=20_000, steps=8, solver="midpoint").mean().item() - MEAN
    assert shift == pytest.approx(7 / 8 * gain * VARIANCE * SLOPE, rel=0.15)


HELD: dict[str, dict[str, Any]] = {
    "adrpo": {"beta": 2.5, "critic_learning_rate": 1e-3},
    "awm": {"beta_ref": 0.4},
    "nft": {"beta_ref": 0.7},
    "nft, paper": {"beta_ref": 0.7, "scale_by_clip": False},
    "ram": {"strength": 0.9},
    "ram, held v": {"strength": 0.1, "base": "current"},
    "rvm": {"beta_ref": 0.3},
}


@pytest.mark.parametrize("t", [0.2, 0.8])
@pytest.mark.parametrize("spread", ["group", "global", "none"])
@pytest.mark.parametrize("case", HELD)
def test_the_stated_tilt_stands_still_for_a_linear_reward(case: str, spread: str, t: float) -> None:
    """At N(m + lambda S a, S), lambda of `tilt_of`, a refresh gives the flow back that it began with."""
    model = make(case.split(",")[0], spread=spread, **HELD[case])
    std = torch.tensor(SLOPE * math.sqrt(VARIANCE), dtype=torch.double, device=DEVICE)
    tilt = model.tilt_of(std).item()
    mean = MEAN + tilt * VARIANCE * SLOPE
    given = Given(mean, VARIANCE, t)
    slope = endpoint.advantage_slope(std, spread, 8)
    v_old, v_ref = (gaussian_field(m, VARIANCE, t, given.x_t) for m in (mean, MEAN))
    a = slope * SLOPE * (given.x_1 - mean)
    if model.critic is not None:
        a = a - given.mean(a)[:, None]
    found = given.minimiser(model.config.row(), a, v_old, v_ref)
    torch.testing.assert_close(found, v_old, rtol=1e-8, atol=1e-8)


def test_methods_without_an_optimum_state_none() -> None:
    std = torch.tensor(1.0)
    none = [("adrpo", {}), ("awm", {"beta_ref": 0.0}), ("awm", {"error_weighting": "ghuber"}), ("rvm", {})]
    none += [("nft", {"beta_ref": 0.0}), ("nft", {"adaptive": True}), ("nft", {"error": "x1_hat"})]
    for name, settings in none:
        assert make(name, **settings).tilt_of(std) is None, (name, settings)
    assert make("ram", spread="none", strength=2.0).tilt_of(std).item() == pytest.approx(2 * 7 / 8)
    assert make("ram", centred=False).tilt_of(std) is None


@pytest.mark.parametrize("spread", ["group", "global", "none"])
@pytest.mark.parametrize("case", HELD)
def test_the_tilt_can_be_asked_for(case: str, spread: str) -> None:
    settings = {**HELD[case], "base": "behaviour"} if case.startswith("ram") else HELD[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = make(case.split(",")[0], spread=spread, target_lambda=0.3, **settings).learn(64)
    assert model.last_logged["rollout/target_lambda"] == pytest.approx(0.3, rel=1e-4)


@pytest.mark.parametrize(("t", "share"), [(0.0, 0.641), (0.1, 0.64), (0.5, 0.78), (0.9, 0.993)])
def test_ram_tilts_early_times_too_little_for_a_concave_reward(t: float, share: float) -> None:
    """r = -k x^2 / 2 on N(0, s^2): at the tilt, its step over the tilt's is what the docstring says."""
    strength, k, s2 = 0.7, 0.8, 1.0
    tilted = s2 / (1 + strength * k * s2)
    given = Given(0.0, tilted, t)
    v_old, v_ref = (gaussian_field(0.0, variance, t, given.x_t) for variance in (tilted, s2))
    row = make("ram", strength=strength).config.row()
    moved = given.minimiser(row, -k / 2 * (given.x_1**2 - tilted), v_old, v_ref) - v_ref
    stated = tilted / s2 * (t**2 * s2 + (1 - t) ** 2) / (t**2 * tilted + (1 - t) ** 2)
    assert stated == pytest.approx(share, abs=0.01)
    torch.testing.assert_close(moved, stated * (v_old - v_ref), rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_ram_stops_at_the_tilt_of_a_linear_reward() -> None:
    env = GaussiansEnv(GaussianMixture([[MEAN]], [[VARIANCE]]), LinearReward((SLOPE,)))
    fit = {"n_samples": 1024, "batch_size": 256, "rollout_steps": 10, "solver": "midpoint", "learning_rate": 2e-3}
    model = make("ram", env, **fit, spread="none", strength=1.5, decay_hold=0.5, decay_rate=0.1, ema_decay=0.98)
    tilt = model.tilt_of(torch.tensor(1.0)).item()
    assert tilt == pytest.approx(1.5 * 7 / 8)
    samples = model.learn(25 * 1024).policy.sample(n=20_000, steps=20, solver="midpoint")
    assert samples.mean().item() - MEAN == pytest.approx(tilt * VARIANCE * SLOPE, rel=0.1)
    assert samples.std().item() == pytest.approx(math.sqrt(VARIANCE), rel=0.07)


# what public code does beyond the papers: against the losses as they are written there


def gradients(model: Any, a: torch.Tensor, written: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient in v of the algorithm's loss, and that of a loss (B,) written out for `v, v_old, v_ref, u, t`."""
    n, generator = len(a), torch.Generator(DEVICE).manual_seed(1)
    v, v_old, v_ref, u, x_t = torch.randn(5, n, 3, generator=generator, dtype=torch.double, device=DEVICE)
    t = torch.rand(n, generator=generator, dtype=torch.double, device=DEVICE)
    v = (v_old + 0.3 * v).requires_grad_()
    fields = {"current": v, "behaviour": v_old, "reference": v_ref}
    rows = torch.arange(n, device=DEVICE)
    batch = Batch(x_t + (1 - t)[:, None] * u, rows, a, a, rows)
    model.noised = lambda batch: (batch, Pair(x_t - t[:, None] * u, t, x_t, u, ()))
    model.velocity = lambda pair, role="current": fields[role]
    losses = model.loss(batch)[0], written(v, v_old, v_ref, u, t).mean()
    own, expected = (torch.autograd.grad(loss, v)[0] for loss in losses)
    return own, expected


def squared(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).square().mean(1)


ADVANTAGES = torch.linspace(-5, 5, 16, dtype=torch.double, device=DEVICE)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("error", ["velocity", "x1_hat"])
def test_nft_is_its_contrast_as_written(error: str, adaptive: bool) -> None:
    b = 0.4

    def written(v, v_old, v_ref, u, t):
        def branch(side: torch.Tensor) -> torch.Tensor:
            miss = (side - u) * ((1 - t)[:, None] if error == "x1_hat" else 1.0)  # x1_hat(v) - x_1 = (1 - t)(v - u)
            size = miss.abs().mean(1).clamp_min(1e-5).detach() if adaptive else 1.0
            return miss.square().mean(1) / size

        r = (ADVANTAGES.clamp(-5, 5) / 5) / 2 + 0.5
        contrast = r * branch((1 - b) * v_old + b * v) + (1 - r) * branch((1 + b) * v_old - b * v)
        return contrast * 5 / b + 1e-4 * squared(v, v_ref)

    model = make("nft", beta=b, beta_ref=1e-4, error=error, adaptive=adaptive)
    own, expected = gradients(model, ADVANTAGES, written)
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("error_weighting", ["square", "ghuber"])
def test_awm_is_its_objective_as_written(error_weighting: str) -> None:
    p = 0.25

    def written(v, v_old, v_ref, u, t):
        m = squared(v, u)
        fit = m if error_weighting == "square" else ((m + 1e-10) ** p - 1e-10**p) * (1 - t) / p
        return ADVANTAGES / 5 * fit + 2e-3 * squared(v, v_ref) + 1.0 * squared(v, v_old)

    model = make("awm", beta_ref=2e-3, beta_old=1.0, error_weighting=error_weighting)
    own, expected = gradients(model, ADVANTAGES, written)
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)


def test_awm_clips_ratios_as_ppo_does() -> None:
    clipped = []

    def written(v, v_old, v_ref, u, t):
        ratio = (squared(v_old, u) - squared(v, u)).exp()
        clipped.append(((ratio - 1).abs() > 0.3).sum().item())
        return clipped_objective(ratio, ADVANTAGES / 5, 0.3) + 1.0 * squared(v, v_old)

    own, expected = gradients(make("awm", beta_ref=0.0, clip_range=0.3), ADVANTAGES, written)
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)
    assert 3 < clipped[0] < 16


def test_adrpo_is_its_loss_as_written() -> None:
    a = ADVANTAGES / 2.5

    def written(v, v_old, v_ref, u, t):
        return a * squared(v, u) + (3 - a) * squared(v, v_ref)

    own, expected = gradients(make("adrpo"), a, written)
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "settings", "decays"),
    [
        ("nft", {}, {0: 0.0, 100: 0.1, 800: 0.5}),
        ("nft", {"decay_flat": 75, "decay_rate": 0.0075, "decay_hold": 0.999}, {75: 0.0, 95: 0.15, 900: 0.999}),
        ("awm", {}, {0: 0.0, 200: 0.2, 400: 0.3}),
        ("ram", {}, {0: 0.0, 50: 0.5, 200: 0.9}),
        ("rvm", {}, {0: 0.0, 1000: 0.0}),
    ],
)
def test_the_old_policy_follows_as_published(name: str, settings: dict[str, Any], decays: dict[int, float]) -> None:
    model = make(name, **settings)
    for iteration, decay in decays.items():
        model.iteration = iteration
        assert model.refresh_decay() == pytest.approx(decay)
    model.iteration = max(decays)
    old, new = (model.policy.parameters_of(role) for role in ("behaviour", "current"))
    before = {key: value.clone() for key, value in old.items()}
    with torch.no_grad():
        for value in new.values():
            value.add_(1.0)
    model.refresh()
    for key, value in old.items():
        torch.testing.assert_close(value, before[key] + 1 - decays[max(decays)])


# advantages and times


def test_advantages_by_hand() -> None:
    reward = torch.tensor([1.0, 3.0, 7.0, 7.0], device=DEVICE)
    group = torch.tensor([0, 0, 2, 2], device=DEVICE)

    def of(spread: str, maximum: float = 5.0, centred: bool = True) -> list[float]:
        return endpoint.advantages(reward, group, spread, maximum, centred).tolist()

    assert of("none") == [-1, 1, 0, 0]
    assert of("none", 0.5) == [-0.5, 0.5, 0, 0]
    assert of("group") == pytest.approx([-1, 1, 0, 0], abs=1e-3)
    assert of("global") == pytest.approx([-1 / math.sqrt(6.75), 1 / math.sqrt(6.75), 0, 0], abs=1e-4)
    assert of("none", 9.0, False) == [1, 3, 7, 7]
    assert of("group", 9.0, False)[:2] == pytest.approx([1, 3], abs=1e-3)


@pytest.mark.parametrize("spread", ["group", "global", "none"])
def test_the_slope_of_advantages(spread: str) -> None:
    """Regression of A on r, of normal rewards in groups of 8."""
    reward = 3 * torch.randn(80_000, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE) + 2
    a = endpoint.advantages(reward, torch.arange(80_000, device=DEVICE) // 8, spread, 50.0)
    found = ((reward - reward.mean()) * a).mean() / reward.var()
    within = reward.view(-1, 8).var(1, correction=0).mean().sqrt()
    assert found.item() == pytest.approx(endpoint.advantage_slope(within, spread, 8).item(), rel=0.01)


@pytest.mark.parametrize("spread", ["global", "none"])
def test_the_slope_of_advantages_that_are_not_centred(spread: str) -> None:
    reward = 3 * torch.randn(80_000, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE) + 2
    a = endpoint.advantages(reward, torch.arange(80_000, device=DEVICE) // 8, spread, 50.0, centred=False)
    found = ((reward - reward.mean()) * a).mean() / reward.var()
    within = reward.view(-1, 8).var(1, correction=0).mean().sqrt()
    stated = make("ram", spread=spread, strength=2.0, centred=False).tilt_of(within)
    assert stated.item() == pytest.approx(2 * found.item(), rel=0.01)


@pytest.mark.parametrize(("kind", "mean"), [("uniform", 1 / 2), ("early", 1 / 3), ("logit_normal", 1 / 2)])
def test_times_fall_one_into_each_part(kind: str, mean: float) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    t = endpoint.stratified_times(20_000, 4, kind, generator).double()
    one = endpoint.stratified_times(80_000, 1, kind, generator).double()
    assert t.mean().item() == pytest.approx(mean, abs=0.004)
    assert one.mean().item() == pytest.approx(mean, abs=0.004)
    assert t.std().item() == pytest.approx(one.std().item(), rel=0.02)
    parts = {
        "uniform": t,
        "early": 1 - (1 - t) ** 2,
        "logit_normal": torch.special.ndtr(t.clamp(1e-7, 1 - 1e-7).logit()),
    }
    part = (parts[kind].reshape(-1, 4) * 4).clamp(1e-4, 4 - 1e-4).floor().long()
    assert (part == torch.arange(4, device=DEVICE)).double().mean() > 0.9999


def test_each_sample_is_noised_several_times() -> None:
    model = make("ram", noisings=3)
    x_1, a = torch.randn(5, 2, device=DEVICE), torch.arange(5.0, device=DEVICE)
    rows = torch.arange(5, device=DEVICE)
    batch, pair = model.noised(Batch(x_1, torch.zeros_like(rows), a, a, rows, {"own": a}))
    assert batch.advantage.tolist() == batch.extra["own"].tolist() == [i for i in range(5) for _ in range(3)]
    torch.testing.assert_close(pair.x_t + (1 - pair.t)[:, None] * pair.u, x_1.repeat_interleave(3, 0))
    assert len(pair.t.unique()) == 15


# settings without meaning


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("awm", {"beta_old": 0.0, "beta_ref": 0.0}, "nothing holds the velocity.*beta_old to 1"),
        ("awm", {"beta_old": 0.5}, "only 0.501 holds"),
        ("rvm", {"beta_old": 0.0}, r"nothing holds the velocity.*gain x max_advantage = 0\.5"),
        ("rvm", {"beta_old": 0.4}, "only 0.4 holds"),
        ("ram", {"base": "current"}, "base 'behaviour', or strength below 0.2"),
        ("adrpo", {"beta": 2.0}, "Refreshes can run away.*beta above max_advantage"),
    ],
)
def test_a_loss_without_a_minimum_is_told_before_the_run(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        make(name, **settings)


@pytest.mark.parametrize("name", FAMILY)
def test_defaults_are_sound_and_groups_of_one_are_refused(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(name)
    with pytest.raises(ConfigError, match="group_size must be at least 2"):
        make(name, group_size=1)


# what stands still


class Constant:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full((len(x),), 0.7, device=x.device)


@pytest.mark.filterwarnings("ignore:Nothing was learnt")
@pytest.mark.parametrize(
    "settings", [{}, {"lora_rank": 4}, {"critic_learning_rate": 1e-2}], ids=["full", "lora", "critic"]
)
@pytest.mark.parametrize("name", FAMILY)
def test_a_constant_reward_moves_nothing(name: str, settings: dict[str, Any]) -> None:
    model = make(name, GaussiansEnv(MIXTURE, Constant()), **settings)
    before = [p.detach().clone() for p in model.policy.parameters_of("current").values()]
    model.learn(3 * 64)
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters_of("current").values()))


@pytest.mark.slow
@pytest.mark.parametrize("critic", [0.0, 5e-3], ids=["as published", "critic"])
def test_errors_grow_from_refresh_to_refresh_without_a_critic(critic: float) -> None:
    """40 refreshes towards the tilt that evaluation compares with."""
    settings = {"n_samples": 512, "batch_size": 128, "rollout_steps": 16, "learning_rate": 1e-3, "ema_decay": 0.98}
    held = {"beta_ref": 7 / 80, "beta_old": 0.5, "spread": "none"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = make("rvm", critic_learning_rate=critic, **settings, **held)
        assert model.tilt_of(torch.tensor(1.0)).item() == pytest.approx(1)
        try:
            model.learn(40 * 512)
        except NonFiniteError:
            assert critic == 0
            return
    assert (flowrl.evaluate(model, n_samples=1024).w2_to_optimum < 0.5) == (critic > 0)


def test_a_critic_is_saved(tmp_path: Path) -> None:
    model = make("awm", critic_learning_rate=1e-2).learn(64)
    model.save(tmp_path / "saved")
    again = type(model).load(tmp_path / "saved", device=DEVICE)
    for one in (model, again):
        one.learn(64, reset_num_timesteps=False)
    ours, theirs = (m.extra_state.state() for m in (model, again))
    assert ours
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert model.last_logged["train/critic_error"] > 0


@pytest.mark.on_device(False)
def test_updates_with_a_critic_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CudaGraph", Tape)
    settings = {"batch_size": 12, "critic_learning_rate": 1e-2}
    eager, replayed = (trained(flowrl.NFT, "gaussians-linear", 6, is_on, **settings) for is_on in (False, True))
    assert any("An update" in key for key in replayed.policy.graphs._captured)
    assert_same(eager, replayed)
    ours, theirs = (m.extra_state.state() for m in (eager, replayed))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_samples_that_stand_in_for_others_carry_nothing() -> None:
    given = Expectations(0.3, 2000)
    model, a = make("nft", adaptive=True, critic_learning_rate=1e-3, beta_ref=0.0), advantages(given, 2.0)
    model.critic = Knows(given, a)
    stray = torch.ones(2000, dtype=torch.bool, device=DEVICE)
    v = given.v["behaviour"][given.bins].clone().requires_grad_()
    batch = Batch(given.x_1, torch.zeros_like(given.bins), a, a, given.bins, {"stray": stray})
    pair = Pair(given.x_1, given.t, given.x_t, given.u, ())
    velocities = {"current": v, "behaviour": v.detach()}
    loss, _ = model.follow(model.config.row(), batch, pair, a, velocities)
    assert not torch.autograd.grad(loss, v)[0].any()


def test_ram_without_centred_rewards_is_moved_by_a_constant() -> None:
    model = make("ram", GaussiansEnv(MIXTURE, Constant()), centred=False, spread="none")
    before = [p.detach().clone() for p in model.policy.parameters_of("current").values()]
    model.learn(64)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.policy.parameters_of("current").values()))
