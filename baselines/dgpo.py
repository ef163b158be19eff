"""DGPO: direct group preference optimisation (Luo et al. 2025, arXiv 2510.08425) on the flow-matching error.

Repeat: draw groups of samples of the same context by the ODE, and raise the likelihood that the better ones of a group
are preferred to the others, each by its advantage; how far the group is from that scales its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from flowrl.config import FlowConfig
from flowrl.registry import register_algorithm
from flowrl.training.groups import WholeGroups, WholeGroupsConfig
from flowrl.types import Batch, Role


@dataclass(frozen=True)
class DGPOConfig(WholeGroupsConfig):
    """Settings of DGPO."""

    beta: float = 10.0
    """Strength of the preference: the larger, the sooner a group that is told apart stops teaching."""
    max_time: float = 0.7
    """Largest time of the loss: as published, that of the noisiest 7 of 10 steps."""
    clip_range: float = 0.05
    """Samples whose `exp(d_old - d)` leaves 1 +- this get no gradient; 0 freezes none, and keeps no old policy."""
    max_advantage: float = 5.0
    """Advantages are clipped at this size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "max_advantage"):
            self.require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}.")
        self.require(self.clip_range >= 0, f"clip_range must not be negative, not {self.clip_range}.")


@register_algorithm("dgpo")
class DGPO(WholeGroups):
    """Direct preference optimisation of groups, with advantages for weights."""

    kind = "endpoint.preference"
    replayable = True
    Config: ClassVar[type[FlowConfig]] = DGPOConfig
    config: DGPOConfig

    @classmethod
    def copies_for(cls, config: Any) -> set[Role]:
        """Keep `v_old` where samples that have moved far from it are frozen."""
        copies = super().copies_for(config)
        return copies | {"behaviour"} if config.clip_range > 0 else copies

    def tilt_of(self, reward_std: torch.Tensor) -> torch.Tensor | None:
        """Give nothing: advantages of a group, not rewards, are compared with log-ratios, and only their sum."""
        return None

    def advantage(self, rollout: Batch) -> torch.Tensor:
        """Compute advantages (B,) relative to the group; zero where all of a group agree."""
        return self.relative(rollout, self.config.max_advantage)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute `sigmoid(S) A d`, `S = beta mean_g A (d - d_ref)` without gradient, `d = |v - u|^2` (eq. 15)."""
        config, advantage = self.config, batch.advantage
        pair = self.group_pair(batch)
        d, d_ref = self.error(pair), self.error(pair, "reference")
        gap = (d - d_ref).detach()
        score = config.beta * self.in_groups(advantage * gap).mean(1)  # (G,), negative where the group is told apart
        doubt = score.sigmoid()
        loss = doubt.repeat_interleave(config.group_size) * advantage * d
        figures = {"doubt": doubt.mean(), "rise": gap.mean()}
        if config.clip_range > 0:
            ratio = (self.error(pair, self.behaviour_role) - d.detach()).exp()
            frozen = (ratio - 1).abs() > config.clip_range
            loss, figures["frozen"] = loss.masked_fill(frozen, 0), frozen.float().mean()
        return loss.mean(), figures
