"""Priority: passes take samples in proportion to the size of what they carry, with importance weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from flowrl.config import FlowConfig
from flowrl.training.noising import Coupled, CouplingConfig
from flowrl.types import Batch


@dataclass(frozen=True)
class PriorityConfig(CouplingConfig):
    """Settings of methods whose passes can take samples by priority."""

    priority: float = 0.0
    """Share of a pass that takes samples in proportion to the size of what they carry (how far the weight is from the
    mean, or the advantage) and not each as often, with importance weights: the same gradient in the mean, with less
    noise, as samples whose groups agree take few passes. 0 takes each once; below 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.priority < 1, f"priority must be at least 0 and less than 1, not {self.priority}.")
        self.require(
            not self.priority or self.coupling not in ("ot", "c2ot"),
            f"coupling '{self.coupling}' itself draws samples by their size: leave priority at 0 with it.",
        )


class Prioritised(Coupled):
    """A `Coupled` algorithm whose passes can take samples by priority (Schaul et al. 2016, for their replay)."""

    Config: ClassVar[type[FlowConfig]] = PriorityConfig
    config: Any

    def sizes(self, coefficient: torch.Tensor) -> torch.Tensor:
        """Compute the size (B,) of what samples carry, from coefficients of this iteration (B,)."""
        return coefficient.abs()

    def order(self) -> torch.Tensor:
        """Take each sample as often as its priority says, rounded up or down at random, in random order."""
        n = self.buffer.size
        shuffled = super().order()
        if not self.config.priority:
            return shuffled
        expected = self._relative(self.buffer.coefficient[:n]).cumsum(0)
        offset = torch.rand(1, generator=self.generator, device=self.device)
        places = (torch.arange(n, device=self.device) + offset) * (expected[-1] / n)
        return torch.searchsorted(expected, places, right=True).clamp_max(n - 1)[shuffled]

    def importance(self, batch: Batch) -> torch.Tensor | float:
        """Compute the importance weights (B,) of a minibatch's samples: one over how often a pass takes them."""
        return 1 / self._relative(batch.coefficient) if self.config.priority else 1.0

    def _relative(self, coefficient: torch.Tensor) -> torch.Tensor:
        """Compute how often (B,) a pass takes samples in expectation, from their coefficients (B,)."""
        share, mean = self.config.priority, self.sizes(self.buffer.coefficient[: self.buffer.size]).mean()
        relative = torch.where(mean > 0, self.sizes(coefficient) / mean, 1.0)  # 0 / 0 where nothing carries anything
        return (1 - share) + share * relative
