"""RAM (arXiv 2605.10759): regression of the velocity on the reference's plus a step of reward.

Repeat: draw groups of samples of a lagging policy, compare their rewards, and on fresh noise and times, most of them
near the noise, follow

    (v - v_ref) - lambda A (u - v)

with v on the right held. It stands still where `v = v_ref + lambda E[A (u - v) | x_t]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from flowrl.config import FlowConfig
from flowrl.functional.endpoint import ROWS, Row, advantages
from flowrl.registry import register_algorithm
from flowrl.training.endpoints import EndpointAlgorithm, EndpointConfig
from flowrl.types import Batch


@dataclass(frozen=True)
class RAMConfig(EndpointConfig):
    """Settings of RAM."""

    strength: float = 1.0
    """lambda, the factor of the advantage; published 50 to 100."""
    base: Literal["behaviour", "current"] = "behaviour"
    """What a sample's velocity is compared with: that of the policy that drew it ("behaviour"), which always has a
    minimum, or the trained one, held ("current"), as published. They stop at the same."""
    centred: bool = True
    """Take the mean of its group off each reward, as published. Without it a constant reward moves the flow."""
    noisings: int = 4
    """How often each sample of a minibatch is noised, at times of as many equal parts; published 4."""
    early_times: bool = True
    """Draw flow times with density 2 (1 - t), near the noise, as published, in place of time_sampling."""
    decay_rate: float = 0.01
    """By how much the share that a refresh keeps of the old policy grows per iteration; published 0.01."""
    decay_hold: float = 0.9
    """Largest share of the old policy that a refresh keeps; published 0.9."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.strength > 0, f"strength must be positive, not {self.strength}.")

    def row(self) -> Row:
        """Give `(v - v_ref) - lambda A (u - base)`."""
        return ROWS["ram"](self.strength, self.base)

    def caution(self) -> str:
        """Say that the reference is too weak an anchor, where it is."""
        text = super().caution()
        return text and f"{text} Take base 'behaviour', or strength below {1 / self.max_advantage:g}."


@register_algorithm("ram")
class RAM(EndpointAlgorithm):
    """Regression on the reference's velocity plus a step of reward (RAM)."""

    replayable = True
    tilt_setting = ("strength", 1)
    Config: ClassVar[type[FlowConfig]] = RAMConfig
    config: RAMConfig

    def compared(self, reward: torch.Tensor, group: torch.Tensor, maximum: float) -> torch.Tensor:
        """Compare one reward (B,) within groups (B,): advantages (B,) in units of the spread."""
        return advantages(reward, group, self.config.spread, maximum, self.config.centred)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the regression on the detached target."""
        batch, pair = self.noised(batch)
        return self.follow(self.config.row(), batch, pair, batch.advantage, {"current": self.velocity(pair)})

    def tilt_of(self, reward_std: torch.Tensor) -> torch.Tensor | None:
        """Give lambda of the tilt that it aims at: `strength dA/dr`; of rewards that are not centred, all of dA/dr.

        None where these are divided by the spread of their own group, which is small where the group happens to agree.
        It gets there for linear rewards on a Gaussian; for `r = -k x^2 / 2` on N(0, s^2) its step is that of the tilt
        times `(S / s^2) (t^2 s^2 + (1 - t)^2) / (t^2 S + (1 - t)^2)`, S the tilt's variance: too little early on.
        """
        stated, config = super().tilt_of(reward_std), self.config
        if stated is None or config.centred:
            return stated
        return None if config.spread == "group" else stated / (1 - 1 / config.group_size)
