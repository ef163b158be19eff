"""Advantage-weighted matching (Xue et al. 2025, arXiv 2509.25050)."""

from dataclasses import dataclass

import flowrl
from flowrl.functional.advantages import group_advantage
from flowrl.functional.losses import clipped_objective, squared_error


@dataclass(frozen=True)
class AWMConfig(flowrl.FlowConfig):
    """Settings of AWM."""

    clip_range: float = 1.0
    """Ratios beyond 1 +- this get no gradient."""
    beta: float = 1.0
    """Strength of |v - v_ref|^2."""


class AWM(flowrl.FlowAlgorithm):
    """Policy gradients on the flow-matching error as a likelihood."""

    Config = AWMConfig

    @classmethod
    def copies_for(cls, config):
        return super().copies_for(config) | {"behaviour"}

    def advantage(self, rollout):
        return group_advantage(rollout.reward, rollout.group) / 5

    def loss(self, batch):
        pair = self.pair(batch)
        v, v_ref = self.velocity(pair), self.velocity(pair, "reference")
        ratio = (self.error(pair, "behaviour") - squared_error(v, pair.u)).exp()
        drift = squared_error(v, v_ref)
        loss = clipped_objective(ratio, batch.advantage, self.config.clip_range) + self.config.beta * drift
        return loss.mean(), {"drift": drift.mean()}
