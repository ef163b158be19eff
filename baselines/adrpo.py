"""ADRPO (Fan et al. 2025, arXiv 2510.18053): a W2 regulariser that adapts to the advantage of each sample.

Repeat: draw groups of samples, compare their rewards, and on fresh noise and times minimise

    A |v - u|^2 + (beta - A) |v - v_ref|^2

Good samples are held less by the reference, bad ones more. A cancels in the quadratic part: the gradient in v is that
of `beta (v - v_ref) - A (u - v_ref)`, a row of `flowrl.functional.endpoint`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from flowrl.config import FlowConfig
from flowrl.functional.endpoint import ROWS, Row
from flowrl.registry import register_algorithm
from flowrl.training.endpoints import EndpointAlgorithm, EndpointConfig
from flowrl.types import Batch


@dataclass(frozen=True)
class ADRPOConfig(EndpointConfig):
    """Settings of ADRPO."""

    beta: float = 3.0
    """Strength of |v - v_ref|^2 at advantage zero (beta_0); keep it above max_advantage."""
    max_advantage: float = 2.0
    """Advantages are clipped at this size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.beta > 0, f"beta must be positive, not {self.beta}.")

    def row(self) -> Row:
        """Give `beta (v - v_ref) - A (u - v_ref)`."""
        return ROWS["adrpo"](self.beta)

    def caution(self) -> str:
        """Say that refreshes can run away, where they can: `v - v_ref` grows by E[A | x_t] / beta in each."""
        if self.beta > self.max_advantage or self.critic_learning_rate > 0:
            return ""
        return (
            f"Refreshes can run away: what v has beyond v_ref comes back E[A | x_t] / beta times as large, which with "
            f"beta = {self.beta:g} and advantages up to {self.max_advantage:g} can be more than 1. Set beta above "
            "max_advantage, max_advantage below beta, or take a critic (critic_learning_rate)."
        )


@register_algorithm("adrpo")
class ADRPO(EndpointAlgorithm):
    """Velocity matching with a W2 regulariser that adapts to each sample's advantage (ADRPO)."""

    replayable = True
    tilt_setting = ("beta", -1)
    Config: ClassVar[type[FlowConfig]] = ADRPOConfig
    config: ADRPOConfig

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute `A |v - u|^2 + (beta - A) |v - v_ref|^2`, as a regression with the same gradient."""
        batch, pair = self.noised(batch)
        return self.follow(self.config.row(), batch, pair, batch.advantage, {"current": self.velocity(pair)})

    def tilt_of(self, reward_std: torch.Tensor) -> torch.Tensor | None:
        """Give None: it stops where `(beta - E[A | x_t]) (v - v_ref) = Cov(A, u | x_t)`, which is no tilt.

        To first order in A / beta that is the tilt by `dA/dr / beta`; with a critic it is that itself, for a linear
        reward on a Gaussian.
        """
        return super().tilt_of(reward_std)
