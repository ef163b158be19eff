"""Solvers on an equation with a known solution, and the time grid."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.errors import ConfigError
from flowrl.functional.solver_steps import SOLVERS, evaluations_per_sample
from flowrl.functional.solvers import ode_sample, ode_states, time_grid

pytestmark = pytest.mark.on_device

ORDER = {"euler": 1, "ab2": 2, "midpoint": 2, "heun": 2, "rk4": 4}


def error(solver: str, steps: int) -> float:
    """dx/dt = (1 + t) x from x(0) = 1: x(1) = exp(3 / 2)."""
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    x_0 = torch.ones(2, 3, dtype=torch.float64)
    x_1 = ode_sample(lambda x, t: (1 + t)[:, None] * x, x_0, times, solver)
    return (x_1 - math.exp(1.5)).abs().max().item()


def test_every_solver_has_an_order_here() -> None:
    assert ORDER.keys() == SOLVERS.keys()


@pytest.mark.parametrize("solver", SOLVERS)
def test_order_of_convergence(solver: str) -> None:
    """Halving the step divides the error by 2^order."""
    orders = [math.log2(error(solver, n) / error(solver, 2 * n)) for n in (16, 32)]
    assert orders == pytest.approx([ORDER[solver]] * 2, abs=0.2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_straight_field_is_exact_in_one_step(solver: str) -> None:
    x_0, u = torch.randn(4, 2), torch.randn(4, 2)
    torch.testing.assert_close(ode_sample(lambda x, t: u, x_0, time_grid(1), solver), x_0 + u)


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations(solver: str) -> None:
    seen = []

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.shape == (5,)
        seen.append(t[0].item())
        return x

    ode_sample(field, torch.ones(5, 2), time_grid(3), solver)
    assert len(seen) == evaluations_per_sample(solver, 3)
    assert min(seen) == 0
    assert max(seen) <= 1


def test_uneven_times() -> None:
    """Euler on dx/dt = x multiplies by (1 + h) at every step, whatever its size."""
    times = torch.tensor([0.0, 0.1, 0.5, 1.0])
    x = ode_sample(lambda x, t: x, torch.ones(1, 1), times, "euler")
    assert x.item() == pytest.approx(1.1 * 1.4 * 1.5)


def test_adams_bashforth_on_uneven_times() -> None:
    """An Euler step, then the line through the last two slopes: exact where the slope is a line in t."""
    times = torch.tensor([0.0, 0.1, 0.5, 0.6, 1.0])
    after_one, *_, end = ode_states(lambda x, t: (1 + 3 * t)[:, None], torch.zeros(1, 1), times, "ab2")
    assert after_one.item() == pytest.approx(0.1)
    assert end.item() == pytest.approx(0.1 + 0.9 + 1.5 * (1 - 0.1**2))


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_flow_through_the_last_steps(solver: str) -> None:
    """The path is the same, and only slopes of the last steps carry gradients."""
    scale, times = torch.tensor(1.0, requires_grad=True), time_grid(4)
    slopes: list[bool] = []

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        slopes.append((scale * x).requires_grad)
        return scale * x

    x_0 = torch.ones(1, 1)
    whole, last = ode_sample(field, x_0, times, solver), ode_sample(field, x_0, times, solver, 1)
    assert torch.equal(whole, last)
    n = len(slopes) // 2
    assert slopes == [True] * n + [False] * (n - n // 4) + [True] * (n // 4)
    assert 0 < torch.autograd.grad(last.sum(), scale)[0] < torch.autograd.grad(whole.sum(), scale)[0]


def test_unknown_solver() -> None:
    with pytest.raises(ConfigError, match=r"eulr.*euler"):
        ode_sample(lambda x, t: x, torch.ones(1, 1), time_grid(2), "eulr")


def test_time_grid_without_shift() -> None:
    assert time_grid(4).tolist() == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_time_grid_shift(shift: float) -> None:
    """sigma' = shift sigma / (1 + (shift - 1) sigma) with sigma = 1 - t; for shift 3, 3 sigma / (1 + 2 sigma)."""
    expected = []
    for k in range(11):
        sigma = 1 - k / 10
        expected.append(1 - shift * sigma / (1 + (shift - 1) * sigma))
    assert time_grid(10, shift).tolist() == pytest.approx(expected, abs=1e-6)
    assert time_grid(10, shift)[[0, -1]].tolist() == [0, 1]


def test_shift_spends_steps_near_the_noise() -> None:
    assert time_grid(2, shift=3.0)[1].item() == pytest.approx(0.25)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps(steps: int) -> None:
    with pytest.raises(ConfigError, match="at least one step"):
        time_grid(steps)
