"""ReFL (Xu et al. 2023, arXiv 2304.05977): the gradient of the reward of a sample that is estimated in one late step.

Repeat: sample to a random late time t without gradients, estimate the sample there, and follow the gradient of

    r(x + (1 - t) v(x, t)) - alpha |v - v_ref|^2

It is `-(1 - t) grad r` in v: one evaluation with its backward pass a sample, however many steps the sampler has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from flowrl.config import FlowConfig
from flowrl.functional.flow import x1_hat
from flowrl.functional.solvers import ode_sample
from flowrl.registry import register_algorithm
from flowrl.training.reward_gradients import RewardGradientAlgorithm, RewardGradientConfig


@dataclass(frozen=True)
class ReFLConfig(RewardGradientConfig):
    """Settings of ReFL."""

    late_share: float = 0.25
    """Share of the sampler's steps, from the last on, one of which is drawn; published 10 of 40."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.late_share <= 1, f"late_share must be in (0, 1], not {self.late_share}.")


@register_algorithm("refl")
class ReFL(RewardGradientAlgorithm):
    """Reward feedback learning."""

    Config: ClassVar[type[FlowConfig]] = ReFLConfig
    config: ReFLConfig

    def followed(self, context_ids: torch.Tensor) -> torch.Tensor:
        """Estimate latents `x_1` (B, *latent_shape) from a late step, with the gradient of that estimate."""
        policy, times = self.policy, self.policy.times()
        n_steps = len(times) - 1
        n_late = max(1, round(self.config.late_share * n_steps))
        step = n_steps - 1 - int(torch.randint(n_late, (), generator=self.generator, device=self.device))
        field = policy.field(policy.condition(context_ids), len(context_ids), "current")
        x_0 = policy.noise(len(context_ids), self.generator)
        with torch.no_grad():
            x_t = ode_sample(field, x_0, times[: step + 1], self.config.solver)
        t = times[step].expand(len(x_t))
        return x1_hat(field(x_t, t), x_t, t)
