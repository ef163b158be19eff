"""Solvers of the ODE of a velocity field, from noise (t = 0) to data (t = 1): plain functions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from flowrl.errors import ConfigError
from flowrl.functional.solver_steps import SOLVERS, Solver
from flowrl.types import Field


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


def ode_states(
    v: Field, x_0: torch.Tensor, times: torch.Tensor, solver: Solver = "euler", grad_steps: int | None = None
) -> Iterator[torch.Tensor]:
    """Solve dx/dt = v(x, t) from `x_0` at `times[0]` on: give x (B, ...) at each later time.

    Args:
        v: Velocity field, `(x (B, ...), t (B,)) -> (B, ...)`.
        x_0: (B, ...), float32: the state stays in float32 whatever the field computes in.
        times: (K + 1,) increasing, on the device of `x_0`.
        solver: One of `SOLVERS`.
        grad_steps: The last steps that gradients flow through; all when not given.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"Unknown solver '{solver}'. Known: {', '.join(SOLVERS)}.")
    step, x, h = SOLVERS[solver][0](), x_0, times.diff()
    for k in range(len(h)):
        with torch.set_grad_enabled(torch.is_grad_enabled() and (grad_steps is None or k >= len(h) - grad_steps)):
            x = step(v, x, times[k].expand(len(x)), h[k])
        yield x


def ode_sample(
    v: Field, x_0: torch.Tensor, times: torch.Tensor, solver: Solver = "euler", grad_steps: int | None = None
) -> torch.Tensor:
    """Solve dx/dt = v(x, t) from `x_0` at `times[0]` to `times[-1]`: x there, (B, ...); see `ode_states`."""
    return next(iter(deque(ode_states(v, x_0, times, solver, grad_steps), maxlen=1)), x_0)
