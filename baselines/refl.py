"""ReFL (Xu et al. 2023, arXiv 2304.05977): the gradient of the reward of a sample that is estimated in one late step.

Repeat: sample to a random late time t without gradients, estimate the sample there, and follow the gradient of

    r(x + (1 - t) v(x, t)) - alpha |v - v_ref|^2

It is `-(1 - t) grad r` in v: one evaluation with its backward pass a sample, however many steps the sampler has.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch

from flowrl.config import FlowConfig
from flowrl.functional.flow import drawn, x1_hat
from flowrl.functional.solvers import ode_states
from flowrl.registry import register_algorithm
from flowrl.training.reward_gradients import RewardGradientAlgorithm, RewardGradientConfig


@dataclass(frozen=True)
class ReFLConfig(RewardGradientConfig):
    """Settings of ReFL."""

    late_share: float = 0.25
    """Share of the sampler's steps, from the last on, one of which is drawn for each sample; published 10 of 40."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.late_share <= 1, f"late_share must be in (0, 1], not {self.late_share}.")


@register_algorithm("refl")
class ReFL(RewardGradientAlgorithm):
    """Reward feedback learning."""

    kind = "gradient.estimated"
    Config: ClassVar[type[FlowConfig]] = ReFLConfig
    config: ReFLConfig

    def followed(self, context_ids: torch.Tensor) -> torch.Tensor:
        """Estimate latents `x_1` (B, *latent_shape) from late steps, with the gradient of that estimate."""
        x_t, t = self.late_states(context_ids)
        field = self.policy.field(self.policy.condition(context_ids), len(context_ids), "current")
        return x1_hat(field(x_t, t), x_t, t)

    @torch.no_grad()
    def late_states(self, context_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw states (B, *latent_shape) before a random late step of the sampler, for each its own, and times (B,)."""
        policy, times, n = self.policy, self.policy.times(), len(context_ids)
        n_steps = len(times) - 1
        first = n_steps - max(1, round(self.config.late_share * n_steps))
        field = policy.field(policy.condition(context_ids), n, "current")
        x = policy.noise(n, self.generator)
        path = ode_states(field, x, times[:-1], self.config.solver)
        states = [state for k, state in enumerate(chain([x], path)) if k >= first]
        generator, device = self.generator, self.device
        late = drawn(lambda rows: torch.randint(len(states), (rows,), generator=generator, device=device), n, generator)
        return torch.stack(states, 1)[torch.arange(n, device=device), late], times[first + late]
