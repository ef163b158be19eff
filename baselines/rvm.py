"""RVM (arXiv 2608.23664): signed velocity matching, with an optional anchor.

Repeat: draw groups of samples, compare their rewards, and on fresh noise and times follow

    gain A (v - u) + beta_ref (v - v_ref) + beta_old (v - v_old)

Good samples attract the velocity, bad ones repel it; where the latter prevail only an anchor holds it.
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
class RVMConfig(EndpointConfig):
    """Settings of RVM."""

    gain: float = 0.1
    """Factor of the clipped advantage; published 0.1."""
    beta_ref: float = 0.0
    """Strength of |v - v_ref|^2; with it there is an optimum to stop at."""
    beta_old: float = 1.0
    """Strength of |v - v_old|^2 with the policy that drew the samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.gain > 0, f"gain must be positive, not {self.gain}.")
        for name in ("beta_ref", "beta_old"):
            self.require(getattr(self, name) >= 0, f"{name} must not be negative, not {getattr(self, name)}.")

    def row(self) -> Row:
        """Give `gain A (v - u) + beta_ref (v - v_ref) + beta_old (v - v_old)`."""
        return ROWS["rvm"](self.beta_ref, self.beta_old, self.gain)

    def caution(self) -> str:
        """Say that the anchors are missing or too weak, where they are."""
        text, most = super().caution(), self.gain * self.max_advantage
        return text and f"{text} Set beta_ref or beta_old to gain x max_advantage = {most:g} or more."


@register_algorithm("rvm")
class RVM(EndpointAlgorithm):
    """Signed velocity matching: good samples attract, bad ones repel (RVM)."""

    replayable = True
    tilt_setting = ("beta_ref", -1)
    Config: ClassVar[type[FlowConfig]] = RVMConfig
    config: RVMConfig

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the signed matching, as a regression with the same gradient."""
        batch, pair = self.noised(batch)
        return self.follow(self.config.row(), batch, pair, batch.advantage, {"current": self.velocity(pair)})
