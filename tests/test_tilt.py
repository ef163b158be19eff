"""Self-consistent tilting: its weights, its fixed point by quadrature and by training, and its pool of samples."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import DEVICE

import flowrl
from flowrl.errors import ConfigError
from flowrl.functional.losses import residual_weighted_loss, squared_errors
from flowrl.functional.metrics import wasserstein2
from flowrl.functional.tilting import mixture_weight, tilt_level, tilt_ratio
from flowrl.training.reference_pool import ReferencePool
from flowrl.types import Batch, Pair

pytestmark = pytest.mark.on_device

Y = torch.linspace(-12, 12, 2401, dtype=torch.float64)
DY = Y[1] - Y[0]


def normal(x: torch.Tensor, mean: float | torch.Tensor, variance: float) -> torch.Tensor:
    return (-0.5 * (x - mean).square() / variance).exp() / math.sqrt(2 * math.pi * variance)


def normed(p: torch.Tensor) -> torch.Tensor:
    return p / (p.sum() * DY)


CASES = {
    "linear": (normed(normal(Y, 0.3, 1.0)), Y),
    "quadratic": (normed(normal(Y, 0.5, 1.0)), -0.4 * Y**2),
    "two modes": (normed(0.5 * normal(Y, -2.0, 0.06) + 0.5 * normal(Y, 2.0, 0.06)), -((Y - 1) ** 2)),
    "step": (normed(normal(Y, 0.0, 1.0)), 3.0 * (Y > 1)),
}


def exact(q: torch.Tensor, reward: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ratio and the density of the tilt."""
    rho = reward.exp() / (q * reward.exp()).sum() / DY
    return rho, q * rho


def test_weights_of_agreeing_rewards_are_one_exactly() -> None:
    for value in (0.1, -3.7, 1e6):
        reward = torch.full((5,), value, device=DEVICE)
        rho = tilt_ratio(reward, tilt_level(torch.full((5, 7), value, device=DEVICE), 0.3), 0.3)
        assert torch.equal(rho, torch.ones_like(rho))
        assert torch.equal(mixture_weight(rho, 0.3), torch.ones_like(rho))


@pytest.mark.parametrize("pi", [0.1, 0.5, 0.9])
def test_weights_are_bounded_and_need_no_level(pi: float) -> None:
    reference = 3 * torch.randn(6, 50, device=DEVICE)
    reward = torch.tensor([-1e4, -3.0, 0.0, 3.0, 50.0, 1e4], device=DEVICE)
    w = mixture_weight(tilt_ratio(reward, tilt_level(reference, 2.0), 2.0), pi)
    assert bool(w.isfinite().all())
    assert w.min() >= 0
    assert w.max() <= 1 / pi * (1 + 1e-6)
    shifted = mixture_weight(tilt_ratio(reward[1:4] + 7, tilt_level(reference[1:4] + 7, 2.0), 2.0), pi)
    torch.testing.assert_close(shifted, w[1:4], rtol=1e-4, atol=1e-6)


def test_each_context_has_its_own_level() -> None:
    reference = torch.tensor([[0.0, 1.0], [10.0, 12.0]], device=DEVICE)
    rho = tilt_ratio(torch.tensor([1.0, 10.0], device=DEVICE), tilt_level(reference, 1.0), 1.0)
    expected = [math.e / ((1 + math.e) / 2), 1 / ((1 + math.exp(2)) / 2)]
    torch.testing.assert_close(rho, torch.tensor(expected))
    torch.testing.assert_close(mixture_weight(rho, 1e-9), rho)  # pi -> 0: weights of offline regression


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("start", ["reference", "elsewhere"])
def test_refreshes_lead_to_the_tilt_from_anywhere(case: str, start: str) -> None:
    q, reward = CASES[case]
    rho, tilt = exact(q, reward)
    p, pi = q if start == "reference" else normed(normal(Y, -1.0, 4.0)), 0.5
    distances = []
    for _ in range(31):
        distances.append(float(0.5 * (p - tilt).abs().sum() * DY))
        p = normed(mixture_weight(rho, pi) * ((1 - pi) * q + pi * p))
    assert distances[30] <= 0.02
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(distances))


def conditional(p: torch.Tensor, t: float, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Law (X, Y) of samples given states x, not normed, and the velocity u of each pair."""
    x_0 = (x[:, None] - t * Y) / (1 - t)
    return normal(x_0, 0.0, 1.0) / (1 - t) * p * DY, Y - x_0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_mean_gradient_vanishes_at_the_tilt(case: str, t: float) -> None:
    """For any b of the state and the source; a b of the sample's own weight, as "clipped" is, misses the tilt."""
    q, reward = CASES[case]
    rho, tilt = exact(q, reward)
    pi, x = 0.4, torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)
    w = mixture_weight(rho, pi)

    def field(p: torch.Tensor) -> torch.Tensor:
        law, u = conditional(p, t, x)
        return (law * u).sum(1) / law.sum(1)

    def gradient(b_of: Any) -> torch.Tensor:
        v = field(tilt).requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for share, p, base in ((1 - pi, q, field(q)), (pi, tilt, field(tilt))):
            law, u = conditional(p, t, x)
            rows = [a.expand_as(u).reshape(-1, 1) for a in (v[:, None], u, base[:, None])]
            weight, b = w.expand_as(u).reshape(-1), b_of(law).expand_as(u).reshape(-1)
            loss = residual_weighted_loss(squared_errors(*rows), weight, b)
            total = total + share * (law.reshape(-1) * loss).sum()
        law, _ = conditional(tilt, t, x)
        return torch.autograd.grad(total, v)[0] / law.sum(1)

    for b_of in (
        lambda law: torch.ones(1, 1, dtype=torch.float64),
        lambda law: ((law * w).sum(1) / law.sum(1))[:, None],
        lambda law: x.sin()[:, None],
    ):
        assert gradient(b_of).abs().max() <= 1e-6
    assert gradient(lambda law: w.clamp_max(1)[None]).abs().max() > 1e-3


class Constant:
    """A reward that says nothing."""

    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        return torch.full((len(samples),), 0.7, device=samples.device)


@pytest.mark.parametrize("variant", [{}, {"control_variate": "one"}, {"time_weighting": "variance"}, {"lora_rank": 4}])
def test_a_constant_reward_moves_nothing(variant: dict[str, Any]) -> None:
    env = flowrl.make("gaussians-linear")
    env.reward_function = Constant()
    model = flowrl.Tilt("FlowPolicy", env, seed=0, device=DEVICE, n_samples=64, batch_size=32, pool=64, **variant)
    before = {name: p.detach().clone() for name, p in model.policy.parameters_of("current").items()}
    with pytest.warns(UserWarning, match="Nothing was learnt"):
        model.learn(64 * 3)
    assert all(torch.equal(before[n], p) for n, p in model.policy.parameters_of("current").items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gaussians-linear", "gaussians-quadratic"])
def test_training_reaches_the_tilt_and_its_field(name: str) -> None:
    model = flowrl.Tilt("FlowPolicy", name, seed=0, device=DEVICE)
    model.learn(256 * 22)
    env = model.env.core  # as `evaluate` measures, which would transport the reference's samples, too
    exact, other = (env.oracle.sample(2000, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    floor = wasserstein2(exact, other)
    assert wasserstein2(model.policy.sample(n=2000).cpu(), exact) <= 1.25 * floor + 0.03
    optimum = env.reward_function.tilt(env.mixture, 1.0)
    x_1 = optimum.sample(512, torch.Generator(DEVICE).manual_seed(3))
    for t in (0.2, 0.5, 0.8):
        times = torch.full((512,), t, device=DEVICE)
        x_t = (1 - t) * torch.randn(512, 2, device=DEVICE) + t * x_1
        with torch.no_grad():
            v, v_ref = (model.policy.velocity(x_t, times, (), role) for role in ("ema", "reference"))
        v_exact = optimum.velocity(times, x_t)
        assert (v - v_exact).square().mean() < 0.5 * (v_ref - v_exact).square().mean()


def small(**settings: Any) -> flowrl.Tilt:
    defaults = {"n_samples": 8, "group_size": 2, "batch_size": 8, "rollout_steps": 2, "pool": 32, "pool_group": 4}
    return flowrl.Tilt(
        "FlowPolicy",
        "sd3-count",
        env_settings={"flow": "mini-sd3"},
        seed=0,
        device=DEVICE,
        n_epochs=1,
        **{**defaults, **settings},
    )


def test_the_pool_is_rewarded_once_and_the_oldest_contexts_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = small(), []
    pool = model.pool
    assert (len(pool.context), pool.size) == (8, 4)
    reward = type(model).reward
    monkeypatch.setattr(model, "reward", lambda s, ids: asked.extend(ids.tolist()) or reward(model, s, ids))
    pool.hold(model, torch.tensor([5, 6, 5, 7], device=DEVICE))
    assert asked == [5] * 4 + [6] * 4 + [7] * 4
    pool.hold(model, torch.tensor([7, 5], device=DEVICE))
    assert len(asked) == 12
    kept = pool.x_1[pool.slot[7]].clone()
    pool.hold(model, torch.arange(20, 25, device=DEVICE))  # now it is full
    pool.hold(model, torch.tensor([30, 7, 31], device=DEVICE))  # 5 and 6 leave, 7 stays
    assert pool.slot[[5, 6]].tolist() == [-1, -1]
    assert torch.equal(pool.x_1[pool.slot[7]], kept)
    held = pool.slot[[7, 20, 24, 30, 31]]
    assert held.min() >= 0
    assert pool.context[held].tolist() == [7, 20, 24, 30, 31]
    pool.hold(model, torch.arange(40, 44, device=DEVICE))
    assert sorted(pool.slot[pool.slot >= 0].tolist()) == list(range(8))


def test_the_spread_of_rewards_is_that_within_contexts() -> None:
    model = small(reward_units="std", tau=2.0)
    pool = model.pool
    pool.hold(model, torch.tensor([3, 4], device=DEVICE))
    pool.reward[pool.slot[3]] = torch.tensor([0.0, 0.0, 2.0, 2.0], device=DEVICE)
    pool.reward[pool.slot[4]] = torch.tensor([9.0, 9.0, 9.0, 9.0], device=DEVICE)
    torch.testing.assert_close(pool.spread(), torch.tensor(math.sqrt(0.5)))
    assert model.tilt_of(torch.tensor(0.5)) == 4


def test_settings_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="pool = 8 has room for 4 reference samples of 2 contexts, but an iteration"):
        small(pool=8)
    for wrong in (
        {"own_share": 0.0},
        {"own_share": 1.0},
        {"max_time": 0.0},
        {"tau": -1.0},
        {"control_variate": "none"},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            small(**wrong)
    model = small()
    monkeypatch.setattr(model.ranks, "world_size", 3)
    with pytest.raises(ConfigError, match="3 processes cannot share 4 reference samples"):
        ReferencePool(model, 32, 4)


def test_a_minibatch_is_the_mixture() -> None:
    """The loss by hand, with a fixed critic: shares of the mixture, weights in units of the spread, bases by source."""
    model = flowrl.Tilt(
        "FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, n_samples=64, batch_size=64, pool=128,
        own_share=0.2, tau=1.5, reward_units="std",
    )  # fmt: skip
    model.learn(64 * 3)
    rollout, pool = model.buffer.all(), model.pool
    torch.testing.assert_close(model.unit, pool.reward.std(correction=0) + 1e-4)
    rho = (1.5 / model.unit * rollout.reward).exp() / (1.5 / model.unit * pool.reward[0]).exp().mean()
    torch.testing.assert_close(rollout.weight, rho / (1 + 0.2 * (rho - 1)), rtol=1e-4, atol=1e-5)
    state = model.generator.get_state()
    x_1, reward = pool.draw(rollout.context_ids, model.generator)
    pairs = [model.pair(Batch.of(x, rollout.context_ids)) for x in (rollout.x_1, x_1)]
    weights = [rollout.weight, model.weights_of(reward, rollout.context_ids)]
    expected = torch.zeros((), device=DEVICE)
    improved = []
    with torch.no_grad():
        for share, pair, w, role in zip((0.2, 0.8), pairs, weights, ("behaviour", "reference")):
            b = model.critic(pair.x_t, pair.t, rollout.context_ids).clamp_min(0)
            improved.append((b - w).square().mean())
            v, base = model.velocity(pair), model.velocity(pair, role)
            error = (w - b) * (v - pair.u).square().mean(1) + b * (v - base).square().mean(1)
            expected = expected + share * error.mean()
    model.generator.set_state(state)
    loss, _ = model.loss(rollout)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-6)
    for _ in range(200):  # the critic learns the weights
        model.generator.set_state(state)
        model.loss(rollout)
    with torch.no_grad():
        errors = [(model.critic(p.x_t, p.t, rollout.context_ids) - w).square().mean() for p, w in zip(pairs, weights)]
    assert sum(errors) < 0.8 * sum(improved)


def test_times_of_much_noise_weigh_less() -> None:
    model = flowrl.Tilt(
        "FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, pool=64, time_weighting="variance", max_time=0.8
    )
    t = torch.tensor([0.01, 0.41, 0.79, 0.79], device=DEVICE)
    u = torch.tensor([1.0, 2.0, 3.0, 5.0], device=DEVICE).sqrt()[:, None].expand(-1, 2)
    pair, base = Pair(u, t, u, u, ()), torch.zeros_like(u)
    weight = model.time_weight(pair, base)
    torch.testing.assert_close(weight, torch.tensor([1, 1 / 2, 1 / 4, 1 / 4], device=DEVICE) * 3 / (1 + 1 / 2 + 1 / 4))
    again = model.time_weight(Pair(u, t[:1], u, u[2:3], ()), base[:1])  # a running mean: 2 at the first time now
    torch.testing.assert_close(again, torch.tensor([1 / 2], device=DEVICE) * 3 / (1 / 2 + 1 / 2 + 1 / 4))


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_errors_that_are_not_finite_do_not_stay_in_the_means_of_times(odd: float) -> None:
    model = flowrl.Tilt("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, pool=64, time_weighting="variance")
    t, u = torch.tensor([0.01, 0.51, 0.51], device=DEVICE), torch.ones(3, 2, device=DEVICE)
    bad = u.index_fill(0, torch.tensor([1], device=DEVICE), odd)
    model.time_weight(Pair(u, t, u, bad, ()), torch.zeros_like(u))  # that step is left out
    weight = model.time_weight(Pair(u, t, u, u, ()), torch.zeros_like(u))
    torch.testing.assert_close(weight, torch.ones_like(t))


@pytest.mark.parametrize("kind", ["compares", "runs"])
def test_rewards_that_change_are_not_kept(kind: str) -> None:
    env = flowrl.make("gaussians-linear")
    if kind == "compares":
        env.groupwise = True
    else:
        env.extra_state = lambda: {"seen": torch.zeros(3)}  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"tilt keeps reference samples .* 'fixed' does it"):
        flowrl.Tilt("FlowPolicy", env, seed=0, n_samples=64, group_size=8)


@pytest.mark.parametrize("control_variate", ["critic", "one"])
def test_a_critic_is_there_where_it_is_asked(control_variate: str) -> None:
    model = flowrl.Tilt("FlowPolicy", "gaussians-linear", seed=0, n_samples=64, control_variate=control_variate)
    assert ("critic" in model.extra_state.networks) == (control_variate == "critic")


def test_the_critic_learns_from_both_kinds_of_samples_by_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """`E[w | x_t]` is over the mixture: over halves errors of v_old could grow where own_share is more than a half."""
    settings: dict[str, Any] = {"n_samples": 32, "batch_size": 32, "rollout_steps": 2, "pool": 32, "own_share": 0.8}
    model = flowrl.Tilt("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, **settings)
    _, callback = model._setup_learn(1, None, True, "", False)
    model.collect(callback)
    weights: list[torch.Tensor] = []

    def regress(target: torch.Tensor, weight: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights.append(weight)
        return torch.ones_like(target), target.mean()

    monkeypatch.setattr(model.critic, "regress", regress)
    model.loss(next(model.minibatches()))
    own, reference = weights[0].chunk(2)
    torch.testing.assert_close(own, torch.full_like(own, 1.6))
    torch.testing.assert_close(reference, torch.full_like(reference, 0.4))
