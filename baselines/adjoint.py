"""Adjoint Matching (Domingo-Enrich et al., ICLR 2025, arXiv 2409.08861): regression on the lean adjoint of noisy paths.

Repeat: draw paths of the flow in training by the memoryless sampler, `eta = (1 - t) / t`,

    dX = (2 v - X / t) dt + sqrt(2 eta) dW

go back along each by the lean adjoint, which knows the reference alone,

    a_1 = -tau grad r(X_1)        da/dt = -(2 (grad v_ref)^T a - a / t)

and minimise `|v - (v_ref - eta a)|^2 / eta` along the paths, the targets being held. The optimum is the tilt
`q_ref e^{tau r} / Z`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from flowrl.config import FlowConfig
from flowrl.errors import ConfigError
from flowrl.functional.flow import drawn, expand
from flowrl.functional.losses import squared_error
from flowrl.functional.sde import SDE
from flowrl.registry import register_algorithm
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.types import Batch, Rows, has_values

MEMORYLESS = SDE("flow", 2**0.5)


@dataclass(frozen=True)
class AdjointConfig(FlowConfig):
    """Settings of Adjoint Matching."""

    tau: float = 1.0
    """Inverse temperature: the optimum is q_ref e^(tau r) / Z, with many steps."""
    rollout_steps: int = 40
    """Sampler steps of a path, all but the first and the last noisy and trained. With few the tilt falls short."""
    times_per_path: int = 1
    """Different times of each path that a minibatch takes; published 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.tau > 0, f"tau must be positive, not {self.tau}.")
        self.require(self.solver == "euler", f"A noisy sampler takes Euler steps, not '{self.solver}'.")
        self.require(
            self.rollout_steps > 2,
            "rollout_steps must be at least 3: the first step has no noise, which is infinite at t = 0, nor the last.",
        )
        self.require(
            0 < self.times_per_path <= self.rollout_steps - 2,
            f"times_per_path must be from 1 to the {self.rollout_steps - 2} noisy steps, not {self.times_per_path}.",
        )

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason."""
        return super().idle() | {"time_sampling": "for a loss at the sampler's own times"}


@register_algorithm("adjoint")
class AdjointMatching(FlowAlgorithm):
    """Regression of the velocity on the lean adjoint of memoryless paths (Adjoint Matching)."""

    Config: ClassVar[type[FlowConfig]] = AdjointConfig
    kind = "gradient"
    needs_gradient = True
    tilt_setting = ("tau", 1)
    config: AdjointConfig

    def _setup_model(self) -> None:
        super()._setup_model()
        inner = self.policy.times()[1:-1]
        if has_values(inner) and not bool(((inner > 0) & (inner < 1)).all()):
            raise ConfigError(
                "Adjoint Matching divides by t and 1 - t between the first step and the last, but the flow's times are "
                f"{', '.join(f'{t:.3g}' for t in self.policy.times().tolist())}."
            )

    def tilt_of(self, reward_std: torch.Tensor) -> torch.Tensor | None:
        """Compute lambda of the tilt that is aimed at, tau; None under guidance, which the adjoint does not know."""
        return torch.full_like(reward_std, self.config.tau) if self.config.guidance_scale == 1 else None

    def draw(self, context_ids: torch.Tensor) -> tuple[torch.Tensor, Rows]:
        """Draw latents by the memoryless sampler, with the states of its noisy steps and their adjoints for tau = 1."""
        times = self.policy.times()
        window = range(1, len(times) - 2)
        x_1, states, _ = self.policy.sample_path(
            context_ids, MEMORYLESS, role=self.behaviour_role, window=window, generator=self.generator
        )
        x = x_1.detach().requires_grad_()
        a = -torch.autograd.grad(self.reward_of(x, context_ids).sum(), x)[0]
        a = a + self.pulled(states[:, -1], len(times) - 2, a, context_ids)  # an Euler step of dX = v dt
        adjoints = []
        for k in reversed(window):
            a = times[k] / times[k + 1] * a + 2 * self.pulled(states[:, k - 1], k, a, context_ids)
            adjoints.append(a)
        return x_1, {"states": states[:, :-1], "adjoints": torch.stack(adjoints[::-1], dim=1)}

    def pulled(self, x: torch.Tensor, k: int, a: torch.Tensor, context_ids: torch.Tensor) -> torch.Tensor:
        """Compute `h (grad v_ref)^T a` (B, *latent_shape) at states x of step k, whose length is h."""
        times, x = self.policy.times(), x.detach().requires_grad_()
        v = self.policy.velocity(x, times[k].expand(len(x)), self.policy.condition(context_ids), "reference")
        return (times[k + 1] - times[k]) * torch.autograd.grad(v, x, a)[0]

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the error of the velocity at random states of each path, in units of the noise there."""
        states, adjoints, m = batch.extra["states"], batch.extra["adjoints"], self.config.times_per_path
        g, rows = self.generator, torch.arange(len(states), device=self.device)[:, None]
        n_steps = states.shape[1]
        order = drawn(lambda n: torch.rand(n, n_steps, generator=g, device=self.device), len(states), g).argsort(1)
        k = order[:, :m]  # different ones of each path
        x, a = states[rows, k].flatten(0, 1), self.config.tau * adjoints[rows, k].flatten(0, 1)
        t, cond = self.policy.times()[k.flatten() + 1], self.policy.condition(batch.context_ids.repeat_interleave(m))
        v = self.policy.velocity(x, t, cond, exact=True)
        v_ref = self.policy.velocity(x, t, cond, "reference", exact=True)
        eta = (1 - t) / t
        loss = squared_error(v, v_ref - expand(eta, v) * a) / eta
        return loss.mean(), {"drift": squared_error(v, v_ref).detach().mean()}
