"""Steps of ODE solvers, from x at time t over h: plain functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from flowrl.types import Field

Solver = Literal["euler", "ab2", "midpoint", "heun", "rk4"]
Step = Callable[[Field, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def euler_step(v: Field, x: torch.Tensor, t: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Take a step of first order, one evaluation."""
    return x + h * v(x, t)


def midpoint_step(v: Field, x: torch.Tensor, t: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Take a step of second order, two evaluations."""
    return x + h * v(x + h / 2 * v(x, t), t + h / 2)


def heun_step(v: Field, x: torch.Tensor, t: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Take a step of second order, two evaluations (Karras et al. 2022, algorithm 1)."""
    v_0 = v(x, t)
    v_1 = v(x + h * v_0, t + h)
    return x + h / 2 * (v_0 + v_1)


def rk4_step(v: Field, x: torch.Tensor, t: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Take a step of fourth order, four evaluations."""
    k_1 = v(x, t)
    k_2 = v(x + h / 2 * k_1, t + h / 2)
    k_3 = v(x + h / 2 * k_2, t + h / 2)
    k_4 = v(x + h * k_3, t + h)
    return x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)


def adams_bashforth() -> Step:
    """Make steps of second order that take one evaluation each, and the slope of the step before; the first is Euler's.

    For steps of any lengths (Hairer, Norsett, Wanner 1993, III.5).
    """
    before: list[torch.Tensor] = []

    def step(v: Field, x: torch.Tensor, t: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        slope = v(x, t)
        ahead = h / (2 * before[1]) * (slope - before[0]) if before else 0
        before[:] = slope, h
        return x + h * (slope + ahead)

    return step


SOLVERS: dict[str, tuple[Callable[[], Step], int]] = {
    "euler": (lambda: euler_step, 1),
    "ab2": (adams_bashforth, 1),
    "midpoint": (lambda: midpoint_step, 2),
    "heun": (lambda: heun_step, 2),
    "rk4": (lambda: rk4_step, 4),
}
"""What makes the steps of one path, and the evaluations of a step."""


def evaluations_per_sample(solver: str, steps: int) -> int:
    """Count the network evaluations that one sample costs."""
    return SOLVERS[solver][1] * steps
