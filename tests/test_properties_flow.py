"""Properties of the straight path, samplers, schedules, guidance and couplings."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE
from hypothesis import assume, given
from hypothesis import strategies as st
from properties import (
    normal,
    numbers,
    sdes,
    seeded,
    seeds,
    shapes,
    solvers,
    splits,
    time_grids,
)

import flowrl
from flowrl.functional import flow, transport
from flowrl.functional.guidance import guided_velocity
from flowrl.functional.sde import SDE, GaussianStep, sde_sample
from flowrl.functional.solvers import ode_sample, time_grid
from flowrl.types import Batch

pytestmark = pytest.mark.on_device


@given(shapes, st.integers(0, 5), seeds)
def test_one_step_estimates_recover_both_ends_of_a_path(shape, n, seed) -> None:
    x_0, x_1 = normal(seed, n, *shape), normal(seed + 1, n, *shape)
    t = torch.rand(n, generator=seeded(seed))
    x_t, u = flow.interpolate(x_0, x_1, t)
    torch.testing.assert_close(flow.x1_hat(u, x_t, t), x_1, atol=1e-5, rtol=0)
    torch.testing.assert_close(flow.x0_hat(u, x_t, t), x_0, atol=1e-5, rtol=0)
    early = 0.9 * t  # the score is minus the expected noise, by its standard deviation 1 - t
    expected = -flow.x0_hat(u, x_t, early) / (1 - flow.expand(early, x_t))
    torch.testing.assert_close(flow.score(u, x_t, early), expected, atol=1e-4, rtol=1e-4)


@given(solvers, shapes, st.integers(0, 4), time_grids(), seeds)
def test_a_constant_velocity_is_integrated_exactly(solver, shape, n, times, seed) -> None:
    x_0, u = normal(seed, n, *shape), normal(seed + 1, n, *shape)
    before = x_0.clone()
    x_1 = ode_sample(lambda x, t: u, x_0, times, solver)
    assert x_1.dtype == torch.float32
    torch.testing.assert_close(x_1, x_0 + u, atol=1e-5, rtol=1e-5)
    assert torch.equal(x_0, before)


ORDER = {"euler": 1, "ab2": 1, "midpoint": 2, "heun": 2, "rk4": 4}  # the first step of ab2 is of order 1


@given(solvers, time_grids(), st.lists(numbers(-3, 3), min_size=4, max_size=4))
def test_a_solver_of_order_p_integrates_polynomials_in_t_of_degree_below_p(solver, times, coefficients) -> None:
    powers = list(enumerate(coefficients[: ORDER[solver]]))

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return sum(c * t**k for k, c in powers)[:, None].expand_as(x)

    x_1 = ode_sample(field, torch.zeros(1, 1, dtype=torch.float64), times.double(), solver)
    assert x_1.item() == pytest.approx(sum(c / (k + 1) for k, c in powers), abs=1e-9)


def curved(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A field that treats every sample, and every coordinate, by itself."""
    return torch.sin(3 * x) - x * flow.expand(t, x)


@given(solvers, st.integers(1, 12), time_grids(), seeds, st.data())
def test_a_sample_does_not_depend_on_the_others_of_its_batch(solver, n, times, seed, data) -> None:
    x_0 = normal(seed, n, 3)
    whole = ode_sample(curved, x_0, times, solver)
    parts = [ode_sample(curved, part, times, solver) for part in x_0.split(data.draw(splits(n)))]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=1e-5)
    order = torch.randperm(n, generator=seeded(seed))
    torch.testing.assert_close(ode_sample(curved, x_0[order], times, solver), whole[order], atol=1e-6, rtol=1e-5)


@given(sdes, st.integers(2, 8), st.integers(0, 4), shapes, seeds, st.data())
def test_recorded_steps_are_those_that_were_taken(sde, n_steps, n, shape, seed, data) -> None:
    """Shapes, the ODE outside the window, and log-probabilities that belong to the recorded states."""
    start = data.draw(st.integers(0, n_steps - 2))
    window = range(start, data.draw(st.integers(start + 1, n_steps - 1)))
    x_0, times = normal(seed, n, *shape), time_grid(n_steps).to(DEVICE)
    x_1, states, log_probs = sde_sample(curved, x_0, times, sde, seeded(seed), window)
    assert states.shape == (n, len(window) + 1, *shape)
    assert log_probs.shape == (n, len(window))
    before = ode_sample(curved, x_0, times[: window.start + 1]) if window.start else x_0
    torch.testing.assert_close(states[:, 0], before)
    torch.testing.assert_close(ode_sample(curved, states[:, -1], times[window.stop :]), x_1)
    for i, k in enumerate(window):
        t, t_next = times[k].expand(n), times[k + 1].expand(n)
        step = sde.step(curved(states[:, i], t), states[:, i], t, t_next)
        torch.testing.assert_close(step.mean_log_prob(states[:, i + 1]), log_probs[:, i])
    again, _, _ = sde_sample(curved, x_0, times, sde, seeded(seed), window)
    assert torch.equal(x_1, again)


@given(shapes, numbers(0.125, 0.75), numbers(0.0625, 0.125), numbers(0.125, 1.5), seeds)
def test_the_published_step_of_flow_grpo(shape, t, h, a, seed) -> None:
    """mu = x (1 - a^2 h / (2t)) + h (1 + a^2/2) v, std = a sqrt(h (1-t)/t)."""
    x, v = normal(seed, 2, *shape), normal(seed + 1, 2, *shape)
    step = SDE("flow", a).step(v, x, torch.full((2,), t), torch.full((2,), t + h))
    expected = x * (1 - a**2 * h / (2 * t)) + h * (1 + a**2 / 2) * v
    torch.testing.assert_close(step.mean, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(step.std, torch.full((2,), a * math.sqrt(h * (1 - t) / t)), atol=1e-4, rtol=1e-4)


@given(sdes, numbers(0, 0.75), numbers(0.0625, 0.25), seeds)
def test_a_step_with_little_noise_is_the_step_of_the_ode(sde, t, h, seed) -> None:
    x, v = normal(seed, 2, 3), normal(seed + 1, 2, 3)
    step = SDE(sde.kind, 1e-4).step(v, x, torch.full((2,), t), torch.full((2,), t + h))
    torch.testing.assert_close(step.mean, x + h * v, atol=1e-4, rtol=1e-4)
    assert step.std.max() < 1e-2


@given(numbers(0, 0.75), numbers(0.0625, 0.25), numbers(0.125, 1), seeds)
def test_coefficient_preserving_noise_adds_up(t, h, a, seed) -> None:
    """Of x = t x_1 + (1 - t) x_0 the next state has t' x_1 and noise of standard deviation 1 - t'."""
    x_0, x_1 = normal(seed, 1, 3), normal(seed + 1, 1, 3)
    step = SDE("cps", a).step(x_1 - x_0, (1 - t) * x_0 + t * x_1, torch.tensor([t]), torch.tensor([t + h]))
    kept = (step.mean - (t + h) * x_1) / x_0
    torch.testing.assert_close(kept**2 + step.std**2, torch.full((1, 3), (1 - t - h) ** 2), atol=1e-2, rtol=1e-2)


@given(shapes, numbers(0.125, 4), seeds)
def test_a_gaussian_step_is_most_probable_at_its_mean(shape, std, seed) -> None:
    mean, other, noise = (normal(seed + i, 3, *shape) for i in range(3))
    step, elsewhere = (GaussianStep(m, torch.full((3,), std)) for m in (mean, other))
    torch.testing.assert_close(step.sample(torch.zeros_like(noise)), mean)
    at_mean, away = step.mean_log_prob(mean), step.mean_log_prob(step.sample(noise))
    torch.testing.assert_close(at_mean - away, noise.square().flatten(1).mean(1) / 2, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(step.kl(elsewhere), elsewhere.kl(step))
    assert step.kl(step).abs().max() == 0
    # the divergence is the expected log-ratio, which at the mean is exactly that
    torch.testing.assert_close(step.kl(elsewhere), at_mean - elsewhere.mean_log_prob(mean), atol=1e-4, rtol=1e-3)


@given(st.integers(1, 30), numbers(0.125, 8))
def test_times_rise_from_0_to_1_and_the_shift_can_be_taken_back(steps, shift) -> None:
    times = time_grid(steps, shift).to(DEVICE)
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float32
    assert times[[0, -1]].tolist() == [0, 1]
    assert bool((times.diff() > 0).all())
    sigma = 1 - times.double()
    before = sigma / (shift - (shift - 1) * sigma)  # solves sigma = shift s / (1 + (shift - 1) s)
    torch.testing.assert_close(1 - before, torch.linspace(0, 1, steps + 1).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(time_grid(2 * steps, shift).to(DEVICE)[::2], times)
    # reversed in time, a shift is the shift by its inverse
    torch.testing.assert_close(1 - time_grid(steps, 1 / shift).to(DEVICE).flip(0), times, atol=1e-5, rtol=0)


@given(shapes, st.integers(1, 6), numbers(-4, 8), seeds)
def test_guidance_is_a_line_through_both_velocities(shape, n, scale, seed) -> None:
    v, v_null = normal(seed, n, *shape), normal(seed + 1, n, *shape)
    t = torch.rand(n, generator=seeded(seed)).clamp_min(0.01)
    torch.testing.assert_close(guided_velocity(v, v_null, 1.0, t), v, atol=1e-5, rtol=1e-5)
    assert torch.equal(guided_velocity(v, v_null, 0.0, t), v_null)
    both = guided_velocity(v, v_null, scale, t) + guided_velocity(v, v_null, 1 - scale, t)
    torch.testing.assert_close(both, v + v_null, atol=1e-4, rtol=1e-4)
    nearest = guided_velocity(v, v_null, 0.0, t, "cfg_zero")
    off = ((v - nearest) * v_null).flatten(1).sum(1)  # what is left of v has nothing of v_null
    torch.testing.assert_close(off, torch.zeros(n), atol=1e-4, rtol=0)
    torch.testing.assert_close(guided_velocity(v, v_null, 1.0, t, "cfg_zero"), v, atol=1e-5, rtol=1e-5)
    assert guided_velocity(v, v_null, scale, torch.zeros(n), "cfg_zero").abs().max() == 0
    for kind in ("cfg", "cfg_zero"):
        rows = zip(*(part.split(1) for part in (v, v_null, t)))
        singly = torch.cat([guided_velocity(a, b, scale, s, kind) for a, b, s in rows])
        torch.testing.assert_close(singly, guided_velocity(v, v_null, scale, t, kind), atol=1e-5, rtol=1e-5)


@given(st.integers(1, 12), st.integers(1, 3), seeds, st.booleans(), st.data())
def test_optimal_transport_permutes_within_contexts_and_costs_least(n, dim, seed, ties, data) -> None:
    """Never more than the pairing it is given, nor than any other; also where points are equal."""
    x_0, x_1 = normal(seed, n, dim), 10 * normal(seed + 1, n, dim)
    if ties:
        x_0, x_1 = x_0.round(), (x_1 / 10).round()
    contexts = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    index = transport.ot_permutation(x_0, x_1, contexts)
    assert sorted(index.tolist()) == list(range(n))
    assert torch.equal(contexts[index], contexts)

    def cost(order: torch.Tensor) -> float:
        return (x_0[order] - x_1).double().square().sum().item()

    assert cost(index) <= cost(torch.arange(n)) * (1 + 1e-6) + 1e-6
    if n > 1:  # exchange two of the same context
        i = data.draw(st.integers(0, n - 1))
        j = data.draw(st.sampled_from((contexts == contexts[i]).nonzero()[:, 0].tolist()))
        other = index.clone()
        other[[i, j]] = other[[j, i]]
        assert cost(index) <= cost(other) * (1 + 1e-6) + 1e-6


@pytest.fixture(scope="module")
def coupled() -> dict[str, flowrl.ORWCFMW2]:
    return {
        kind: flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", target="plain", coupling=kind, seed=0, device=DEVICE)
        for kind in ("independent", "ot")
    }


@given(st.integers(1, 16), seeds, st.data())
def test_coupling_never_parts_a_sample_from_what_belongs_to_it(coupled, n, seed, data) -> None:
    number = torch.arange(n)
    weight = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.5, 3.0]), min_size=n, max_size=n)))
    assume(weight.sum() > 0)
    batch = Batch(number[:, None].float().expand(n, 2), number % 3, 2.0 * number, weight, number)
    coupled["independent"].generator.manual_seed(seed)
    same, noise = coupled["independent"].couple(batch)
    assert same is batch
    assert noise.shape == (n, 2)
    coupled["ot"].generator.manual_seed(seed)
    chosen, paired = coupled["ot"].couple(batch)
    own = chosen.x_1[:, 0].long()
    assert torch.equal(chosen.context_ids, own % 3)
    assert torch.equal(chosen.reward, 2.0 * own)
    assert torch.equal(chosen.group, own)
    assert (weight[own] > 0).all()  # drawn in proportion to their weights, which are spent by that
    torch.testing.assert_close(chosen.weight, weight.mean().expand(n))
    assert sorted(map(tuple, paired.tolist())) == sorted(map(tuple, noise.tolist()))
