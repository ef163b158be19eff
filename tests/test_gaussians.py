"""Gaussian mixtures: field, density and tilts against sampling, integration and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import DEVICE

import flowrl
from flowrl.envs import gaussians
from flowrl.envs.gaussians import (
    REWARDS,
    GaussianMixture,
    GaussiansEnv,
    LinearReward,
    Oracle,
    QuadraticReward,
    RingReward,
    eight_gaussians,
)
from flowrl.errors import ConfigError
from flowrl.functional.solvers import ode_sample, time_grid
from flowrl.models.mlp import FieldFlow

pytestmark = pytest.mark.on_device


def mixture(dim: int) -> GaussianMixture:
    """Three components of unequal weight with full covariances."""
    rng = np.random.default_rng(dim)
    factors = rng.normal(size=(3, dim, dim)) * 0.4
    covariances = factors @ factors.transpose(0, 2, 1) + 0.1 * np.eye(dim)
    return GaussianMixture(1.5 * rng.normal(size=(3, dim)), covariances, [1.0, 3.0, 2.0]).to(DEVICE)


def numpy_density(q: GaussianMixture, x: np.ndarray) -> np.ndarray:
    """Density at x (B, D), component by component."""
    total = np.zeros(len(x))
    for weight, mean, covariance in zip(*(p.cpu().double().numpy() for p in (q.weights, q.means, q.covariances))):
        offset = x - mean
        exponent = -0.5 * np.sum(offset @ np.linalg.inv(covariance) * offset, axis=1)
        total += weight * np.exp(exponent) / np.sqrt(np.linalg.det(2 * np.pi * covariance))
    return total


def moments(q: GaussianMixture) -> tuple[torch.Tensor, torch.Tensor]:
    mean = (q.weights[:, None] * q.means).sum(0)
    offset = q.means - mean
    within = q.covariances + offset[:, :, None] * offset[:, None, :]
    return mean, (q.weights[:, None, None] * within).sum(0)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_log_prob(dim: int) -> None:
    q, x = mixture(dim), torch.randn(50, dim, dtype=torch.float64)
    np.testing.assert_allclose(q.log_prob(x).cpu(), np.log(numpy_density(q, x.cpu().numpy())), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_sample_has_the_moments_of_the_mixture(dim: int, generator: torch.Generator) -> None:
    q = mixture(dim)
    x = q.sample(100_000, generator)
    mean, covariance = moments(q)
    torch.testing.assert_close(x.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(x.T).reshape(dim, dim), covariance, atol=0.05, rtol=0)


@pytest.mark.parametrize("t", [0.15, 0.5, 0.85])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_velocity_is_the_conditional_expectation(dim: int, t: float, generator: torch.Generator) -> None:
    """E[x_1 - x_0 | x_t = x] by self-normalised sampling of x_1, with x_0 = (x - t x_1) / (1 - t)."""
    q = mixture(dim)
    x_1 = q.sample(400_000, generator).double()
    centre = t * moments(q)[0].double()
    for x in centre + 0.3 * torch.randn(3, dim, dtype=torch.float64):
        x_0 = (x - t * x_1) / (1 - t)
        weight = torch.exp(-0.5 * (x_0**2).sum(1))
        u = x_1 - x_0
        expected = (weight[:, None] * u).sum(0) / weight.sum()
        error = ((weight[:, None] * (u - expected)) ** 2).sum(0).sqrt() / weight.sum()
        got = q.velocity(torch.tensor([t]), x[None])[0]
        assert bool(((got - expected).abs() < 5 * error + 1e-4).all()), (got, expected, error)


def test_velocity_at_both_ends() -> None:
    q, x = mixture(2), torch.randn(10, 2)
    torch.testing.assert_close(q.velocity(torch.zeros(10), x), moments(q)[0] - x)  # x_0 = x, x_1 independent
    torch.testing.assert_close(q.velocity(torch.ones(10), x), x)  # x_1 = x, E[x_0] = 0


def test_velocity_takes_a_time_per_sample_or_one_for_all() -> None:
    q, x, t = mixture(2), torch.randn(4, 2), torch.tensor([0.1, 0.4, 0.6, 0.9])
    together = q.velocity(t, x)
    for i in range(4):
        torch.testing.assert_close(q.velocity(t[i], x[i : i + 1])[0], together[i])
    assert q.velocity(0.5, x.double()).dtype == torch.float64


def test_velocity_far_away_is_finite() -> None:
    """Responsibilities of components hundreds of spreads away underflow without logsumexp."""
    v = eight_gaussians().velocity(torch.tensor([0.99, 1.0]), torch.tensor([[60.0, 0.0], [60.0, 0.0]]))
    assert bool(v.isfinite().all())


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_the_ode_carries_noise_to_the_mixture(dim: int, generator: torch.Generator) -> None:
    q, n = mixture(dim), 20_000
    x_0 = torch.randn(n, dim, generator=generator)
    x_1 = ode_sample(lambda x, t: q.velocity(t, x), x_0, time_grid(40), "rk4")
    mean, covariance = moments(q)
    torch.testing.assert_close(x_1.mean(0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cov(x_1.T).reshape(dim, dim), covariance, atol=0.1, rtol=0)
    exact = q.sample(n, generator)
    gap = q.log_prob(x_1).mean() - q.log_prob(exact).mean()  # the same entropy, not only the same moments
    assert gap.abs() < 0.04


def grid(dim: int, n: int) -> tuple[np.ndarray, float]:
    """Points (N, dim) of a fine grid on [-8, 8]^dim, and the volume of a cell."""
    axis = np.linspace(-8, 8, n)
    points = np.stack(np.meshgrid(*[axis] * dim, indexing="ij"), -1).reshape(-1, dim)
    return points, (axis[1] - axis[0]) ** dim


def assert_tilted(tilted: GaussianMixture, q: GaussianMixture, exponent: np.ndarray, points: np.ndarray, cell: float):
    """The density of `tilted` is q e^exponent, normalised by the sum over the grid."""
    expected = numpy_density(q, points) * np.exp(exponent)
    expected /= expected.sum() * cell
    got = tilted.log_prob(torch.from_numpy(points).to(DEVICE)).exp().cpu().numpy()
    assert got.sum() * cell == pytest.approx(1, abs=2e-3)
    np.testing.assert_allclose(got, expected, atol=2e-3 * expected.max())


A_LINEAR = {1: (0.8,), 2: (0.8, -0.5)}
CURVATURE = {1: ((0.9,),), 2: ((0.9, 0.3), (0.3, 0.5))}
CENTRE = {1: (1.2,), 2: (1.2, -0.4)}


@pytest.mark.parametrize("tau", [0.5, 2.0])
@pytest.mark.parametrize("dim", [1, 2])
def test_linear_tilt(dim: int, tau: float) -> None:
    q, (points, cell) = mixture(dim), grid(dim, 401)
    exponent = tau * points @ np.array(A_LINEAR[dim])
    assert_tilted(q.tilt(tau, linear=A_LINEAR[dim]), q, exponent, points, cell)


@pytest.mark.parametrize("tau", [0.5, 2.0])
@pytest.mark.parametrize("dim", [1, 2])
def test_quadratic_tilt(dim: int, tau: float) -> None:
    q, (points, cell) = mixture(dim), grid(dim, 401)
    offset = points - np.array(CENTRE[dim])
    exponent = -0.5 * tau * np.sum(offset @ np.array(CURVATURE[dim]) * offset, axis=1)
    assert_tilted(q.tilt(tau, quadratic=(CURVATURE[dim], CENTRE[dim])), q, exponent, points, cell)


def test_linear_and_quadratic_tilt_together() -> None:
    q, (points, cell) = mixture(2), grid(2, 401)
    offset = points - np.array(CENTRE[2])
    reward = points @ np.array(A_LINEAR[2]) - 0.5 * np.sum(offset @ np.array(CURVATURE[2]) * offset, axis=1)
    tilted = q.tilt(0.7, linear=A_LINEAR[2], quadratic=(CURVATURE[2], CENTRE[2]))
    assert_tilted(tilted, q, 0.7 * reward, points, cell)


def test_tilt_by_nothing_is_the_mixture() -> None:
    q = mixture(2)
    for tilted in (q.tilt(0.0, linear=(1.0, 2.0)), q.tilt(3.0)):
        for name in ("means", "covariances", "weights"):
            torch.testing.assert_close(getattr(tilted, name), getattr(q, name), rtol=1e-4, atol=1e-5)


def test_two_tilts_add_up() -> None:
    """C7: n refreshes by tau are one by n tau."""
    q = mixture(2)
    twice = q.tilt(0.4, quadratic=(CURVATURE[2], CENTRE[2])).tilt(0.4, quadratic=(CURVATURE[2], CENTRE[2]))
    once = q.tilt(0.8, quadratic=(CURVATURE[2], CENTRE[2]))
    for name in ("means", "covariances", "weights"):
        torch.testing.assert_close(getattr(twice, name), getattr(once, name), rtol=1e-3, atol=1e-4)


def test_a_tilt_that_cannot_be_normalised() -> None:
    q = GaussianMixture([[0.0, 0.0]], 0.5 * np.eye(2))
    q.tilt(1.9, quadratic=(-np.eye(2), (0, 0)))  # precision 2 - 1.9
    with pytest.raises(ConfigError, match=r"tau = 2\.1 cannot be normalised"):
        q.tilt(2.1, quadratic=(-np.eye(2), (0, 0)))


@pytest.mark.parametrize(("kind", "tau"), [("ring", -0.5), ("ring", math.inf), ("ring", 1e30), ("quadratic", -20.0)])
def test_a_tau_without_an_optimum_is_refused_when_the_environment_is_made(
    kind: str, tau: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the ring at -0.5 samples of the reference were compared with; at 1e30 its own were drawn for ever."""
    monkeypatch.setattr(gaussians, "MOST_ROUNDS", 20)
    with pytest.raises(ConfigError):
        flowrl.make(f"gaussians-{kind}", tau=tau)
    assert flowrl.make("gaussians-linear", tau=-0.5).oracle.tau == -0.5


def test_a_flow_of_another_dimension_is_refused_when_the_environment_is_made() -> None:
    """The first reward ended in an error of shapes."""
    with pytest.raises(ConfigError, match=r"'gaussians-linear' needs a flow of samples of shape \(2,\), not \(50,\)"):
        flowrl.make("gaussians-linear", flow="plans")


@pytest.mark.parametrize("kind", REWARDS)
def test_reward_functions_by_hand(kind: str) -> None:
    x = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    expected = {
        "linear": [1.0, -3.0],
        "quadratic": [-0.5 * (0 + 1), -0.5 * (16 + 0.25)],
        "ring": [-0.5 * ((r - 1.5) / 0.5) ** 2 for r in (2.0, math.hypot(4.0, 0.5))],
    }
    assert REWARDS[kind][0](x).tolist() == pytest.approx(expected[kind], rel=1e-5)


@pytest.mark.parametrize(
    "reward",
    [LinearReward((0.8, -0.5), 3.0), QuadraticReward(CURVATURE[2], CENTRE[2]), RingReward(1.5, 0.5, (1.0, 0.0))],
    ids=["linear", "quadratic", "ring"],
)
def test_exact_samples_agree_with_importance_weighting(reward, generator: torch.Generator) -> None:
    """Means of several functions under q e^{tau r} / Z, by weighting samples of q."""
    base, tau = eight_gaussians(1.5, 0.6), 0.8
    x = base.sample(400_000, generator)
    weight = (tau * reward(x)).double().exp()
    exact = Oracle(base, reward, tau).sample(100_000, generator)
    assert exact.shape == (100_000, 2)
    for function in (lambda p: p[:, 0], lambda p: p[:, 1], lambda p: p.norm(dim=1), lambda p: p[:, 0] ** 2, reward):
        expected = ((weight * function(x)).sum() / weight.sum()).item()
        assert function(exact).mean().item() == pytest.approx(expected, abs=0.05)


def test_oracle_takes_another_tau(generator: torch.Generator) -> None:
    oracle = Oracle(GaussianMixture([[0.0]], [[1.0]]), LinearReward((1.0,)), tau=1.0)
    means = [oracle.sample(50_000, generator, tau=tau).mean().item() for tau in (None, 0.0, 2.0)]
    assert means == pytest.approx([1, 0, 2], abs=0.03)


def test_an_environment_has_an_oracle_when_its_reward_does() -> None:
    q = GaussianMixture([[0.0, 0.0, 0.0]], np.eye(3))
    assert GaussiansEnv(q, LinearReward((1.0, 0.0, 0.0))).oracle is not None
    env = GaussiansEnv(q, lambda x: x.sum(1))
    assert env.oracle is None
    assert env.evaluate(torch.ones(2, 3), torch.zeros(2, dtype=torch.long)).reward.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.0, 0.0], np.eye(2)), r"means must have shape \(K, D\), not \(2,\)"),
        (([[0.0, 0.0]], np.eye(3)), r"covariances must have shape .*\(2, 2\), not \(3, 3\)"),
        (([[0.0, 0.0]], np.ones((2, 2, 2))), r"not \(2, 2, 2\)"),
        (([[0.0, 0.0]], [[1.0, 2.0], [2.0, 1.0]]), "positive definite"),
        (([[0.0], [1.0]], [[1.0]], [1.0]), "weights must be 2 numbers"),
        (([[0.0], [1.0]], [[1.0]], [1.0, -1.0]), "none negative"),
        (([[0.0], [1.0]], [[1.0]], [0.0, 0.0]), "not all zero"),
        (([[0.0], [1.0]], [[1.0]], [math.nan, 1.0]), "weights"),
    ],
)
def test_bad_parameters(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GaussianMixture(*arguments)


def test_covariances_must_be_symmetric() -> None:
    with pytest.raises(ConfigError, match="symmetric"):
        GaussianMixture([[0.0, 0.0]], [[1.0, 0.5], [0.0, 1.0]])


def test_an_unsymmetric_curvature_tilts_like_its_symmetric_part() -> None:
    q, centre = mixture(2), (0.3, -0.2)
    one = q.tilt(1.0, quadratic=(((1.0, 0.8), (0.0, 1.0)), centre))
    other = q.tilt(1.0, quadratic=(((1.0, 0.4), (0.4, 1.0)), centre))
    torch.testing.assert_close(one.means, other.means)
    torch.testing.assert_close(one.covariances, other.covariances)


@pytest.mark.parametrize("tilt", [{"linear": (1.0, 2.0, 3.0)}, {"quadratic": (np.eye(3), (0.0, 0.0, 0.0))}])
def test_a_tilt_of_another_dimension(tilt: dict) -> None:
    with pytest.raises(ConfigError, match="shape"):
        mixture(2).tilt(1.0, **tilt)


def test_exact_answers_are_where_they_are_asked_for() -> None:
    """On a second device: the mixture stays where it was made, and mixing devices would be an error."""
    q = eight_gaussians()
    x, t = torch.empty(5, 2, device="meta"), torch.empty(5, device="meta")
    assert q.velocity(t, x).device == x.device
    assert q.velocity(torch.rand(5), x).device == x.device
    assert FieldFlow(q.velocity, 2).to("meta")(x, t, ()).device == x.device
    for reward, _ in REWARDS.values():
        assert reward(x).device == x.device


def test_a_mixture_is_on_the_device_of_its_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GaussianMixture, "_check_weights", lambda self, weights: None)  # these look at values
    monkeypatch.setattr(GaussianMixture, "_check_covariances", lambda self: None)
    for weights in (None, [0.5, 0.5]):
        q = GaussianMixture(torch.zeros(2, 3, device="meta"), torch.eye(3), weights)
        assert {p.device.type for p in (q.means, q.covariances, q.weights)} == {"meta"}
        assert q.to("meta").velocity(0.5, torch.empty(4, 3, device="meta")).shape == (4, 3)


@pytest.mark.parametrize(("kind", "pull", "stop"), [("linear", 0.63, 0.75), ("quadratic", 0.44, 0.64)])
def test_what_a_covariance_balances_at_the_tilt(kind: str, pull: float, stop: float) -> None:
    """The tilt's field is an integral of covariances: that at its end is smaller (docs/algorithms.md, one kernel)."""
    q, reward, step = eight_gaussians().to(DEVICE), REWARDS[kind][0], 0.01
    draw = torch.Generator(DEVICE).manual_seed(0)
    t = torch.rand(20_000, generator=draw, device=DEVICE)
    x_0 = torch.randn(20_000, 2, generator=draw, device=DEVICE)

    def pulls(lam: float) -> float:
        """Project `Cov(r, u | x_t)`, the derivative of the field by lambda, on `v - v_ref`."""
        x_t = torch.lerp(x_0, reward.tilt(q, lam).sample(20_000, draw), t[:, None])
        less, here, more = (reward.tilt(q, lam + by).velocity(t, x_t) for by in (-step, 0.0, step))
        moved = here - q.velocity(t, x_t)
        return ((more - less) / (2 * step) * moved).sum().item() / moved.square().sum().item()

    assert pulls(1.0) == pytest.approx(pull, abs=0.02)
    assert pulls(stop) == pytest.approx(1.0, abs=0.02)
