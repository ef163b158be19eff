"""Log-likelihood of samples under a flow, by the instantaneous change of variables (Chen et al. 2018)."""

from __future__ import annotations

import math
from typing import Literal

import torch

from flowrl.errors import NonFiniteError
from flowrl.functional.exact import has_float64
from flowrl.types import Field

Divergence = Literal["auto", "exact", "hutchinson"]

EXACT_UP_TO = 16
"""Dimensions up to which "auto" takes the exact divergence, one backward pass per dimension."""
FIRST_STEP = 0.01
"""The solver's first step, from t = 1 where the divergence is steepest; a step that is too large is tried again."""


def log_prob(
    v: Field,
    x_1: torch.Tensor,
    *,
    divergence: Divergence = "auto",
    n_probes: int = 1,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Compute `log p_1(x_1) = log N(x_0; 0, I) - integral of div v dt`, going back from `x_1` along the flow.

    Solved by Dormand-Prince 5(4) with adaptive steps (torchdiffeq), of one size for the whole batch. The field is
    only asked at times in [0, 1].

    Args:
        v: Velocity field, `(x (B, ...), t (B,)) -> (B, ...)`, differentiable in x.
        x_1: Samples (B, ...).
        divergence: "exact", or Hutchinson's estimate `e^T J e` with random signs e that stay the same for a whole
            solve ("hutchinson"; unbiased); "auto" takes the exact one in up to `EXACT_UP_TO` dimensions.
        n_probes: Number of e that are averaged.
        rtol: Relative tolerance of the solver.
        atol: Absolute tolerance of the solver.
        generator: Source of the signs.

    Returns:
        (B,), summed over dimensions, in nats.

    Raises:
        NonFiniteError: The solver finds no way back: velocities are not finite, or change too much for any step.
    """
    from torchdiffeq import odeint

    dim = x_1[0].numel()
    exact = divergence == "exact" or (divergence == "auto" and dim <= EXACT_UP_TO)
    if exact:
        probes = torch.eye(dim, device=x_1.device).view(dim, 1, *x_1.shape[1:]).expand(dim, *x_1.shape)
    else:
        signs = torch.randint(2, (n_probes, *x_1.shape), generator=generator, device=x_1.device)
        probes = (2.0 * signs - 1) / math.sqrt(n_probes)

    def rates(t: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            velocity = v(x, t.expand(len(x)))
            trace = torch.zeros_like(state[1])
            for probe in probes:
                (product,) = torch.autograd.grad(velocity, x, probe, retain_graph=True)
                trace = trace + (product * probe).flatten(1).sum(1)
        return velocity.detach(), trace

    start = (x_1.detach().float().clone(), torch.zeros(len(x_1), device=x_1.device))
    backwards = torch.tensor([1.0, 0.0], device=x_1.device)
    options = {"first_step": FIRST_STEP, "step_t": backwards[1:]}  # left alone, the last step would pass t = 0
    if not has_float64(x_1.device):
        options["dtype"] = torch.float32  # of times
    with torch.no_grad():
        try:
            path, change = odeint(rates, start, backwards, rtol=rtol, atol=atol, method="dopri5", options=options)
        except AssertionError as error:  # the solver's own checks
            reason = str(error).partition(":")[0]
            raise NonFiniteError(
                f"The likelihood of {len(x_1)} samples cannot be computed: the solver ends with '{reason}'. The flow's "
                "velocities are not finite, or change too much on the way: it has diverged. Go back to an earlier "
                "checkpoint, with a lower learning rate or tau."
            ) from error
    x_0, gained = path[-1], change[-1]  # gained is the integral from 1 to 0: minus that from 0 to 1
    normal = -0.5 * x_0.square().flatten(1).sum(1) - 0.5 * dim * math.log(2 * math.pi)
    return normal + gained
