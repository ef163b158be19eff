"""Solvers of the ODE of a velocity field, from noise (t = 0) to data (t = 1): plain functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from flowrl.errors import ConfigError
from flowrl.types import Field

Solver = Literal["euler", "heun", "midpoint", "rk4"]
Step = Callable[[Field, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def time_grid(steps: int, shift: float = 1.0, device: torch.device | str = "cpu") -> torch.Tensor:
    """Make times (steps + 1,) from 0 to 1, float32.

    `shift` is the resolution shift of Stable Diffusion 3 (Esser et al. 2024, eq. 23): with sigma = 1 - t,
    sigma' = shift sigma / (1 + (shift - 1) sigma).
    """
    if steps < 1:
        raise ConfigError(f"A sampler needs at least one step, not {steps}.")
    sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    return (1 - sigma).float().to(device)


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


SOLVERS: dict[str, tuple[Step, int]] = {
    "euler": (euler_step, 1),
    "midpoint": (midpoint_step, 2),
    "heun": (heun_step, 2),
    "rk4": (rk4_step, 4),
}


def evaluations_per_sample(solver: str, steps: int) -> int:
    """Count the network evaluations that one sample costs."""
    return SOLVERS[solver][1] * steps


def ode_sample(v: Field, x_0: torch.Tensor, times: torch.Tensor, solver: Solver = "euler") -> torch.Tensor:
    """Solve dx/dt = v(x, t) from `x_0` at `times[0]` to `times[-1]`.

    Args:
        v: Velocity field, `(x (B, ...), t (B,)) -> (B, ...)`.
        x_0: (B, ...), float32: the state stays in float32 whatever the field computes in.
        times: (K + 1,) increasing, on the device of `x_0`.
        solver: One of `SOLVERS`.

    Returns:
        x at the last time, (B, ...).
    """
    if solver not in SOLVERS:
        raise ConfigError(f"Unknown solver '{solver}'. Known: {', '.join(SOLVERS)}.")
    step, _ = SOLVERS[solver]
    x = x_0
    h = times.diff()
    for k in range(len(h)):
        x = step(v, x, times[k].expand(len(x)), h[k])
    return x
