"""RAFT (Dong et al., TMLR 2023, arXiv 2304.06767): fine-tune on the best samples only.

Repeat: draw K samples per context, keep the best (or all above a threshold), and fit those by plain flow matching.
With `n_best` = K and a threshold this is reward-filtered fine-tuning (ReFT).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from flowrl.config import FlowConfig
from flowrl.functional.advantages import best_of_groups
from flowrl.orw_w2 import ORWCFMW2, ORWCFMW2Config
from flowrl.registry import register_algorithm
from flowrl.types import Batch


@dataclass(frozen=True)
class RAFTConfig(ORWCFMW2Config):
    """Settings of RAFT; `tau` and the normalisation of weights have no effect."""

    alpha: float = 0.0
    """0, as published; above it RAFT + W2, with the penalty alpha |v - v_ref|^2 beside the weight group_size / n_best
    of a sample that is kept."""
    group_size: int = 8
    """K: samples of the same context per iteration, of which the best are kept; must divide n_samples."""
    target: Literal["residual", "plain"] = "plain"
    """"plain", as published; "residual" moves only where samples differ, and with baseline "mean" also away from
    those that are not kept."""
    min_ess: float = 0.0
    """Keeping few samples is what this algorithm does."""
    n_best: int = 1
    """How many of the K are kept."""
    threshold: float = -math.inf
    """Keeps only samples whose reward is above this, of the best."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            0 < self.n_best < self.group_size or (self.n_best == self.group_size and self.threshold > -math.inf),
            f"n_best = {self.n_best} of group_size = {self.group_size} leaves nothing to choose: it must be smaller, "
            "or equal with a threshold.",
        )
        self.require(not self.priority, "raft itself chooses which samples a pass takes: leave priority at 0.")
        self.require(not self.paired_noise, "raft itself chooses which samples a pass takes: leave paired_noise off.")

    def entries_per_epoch(self) -> int:
        """Count what is kept for the plain target, all samples for the residual one."""
        return self.n_samples if self.target == "residual" else self.n_samples // self.group_size * self.n_best

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason."""
        counts = "where the best are kept, however much better they are"
        return super().idle() | dict.fromkeys(("tau", "standardise", "weight_normalisation"), counts)


@register_algorithm("raft")
class RAFT(ORWCFMW2):
    """Reward-ranked fine-tuning."""

    replayable = True
    Config: ClassVar[type[FlowConfig]] = RAFTConfig
    kind = "selection"
    config: RAFTConfig

    def weigh(self, rollout: Batch) -> torch.Tensor:
        """Compute weights (B,): equal for the samples kept, zero for all others, mean one."""
        kept = best_of_groups(rollout.reward, rollout.group, self.config.n_best)
        weight = (kept & (rollout.reward > self.config.threshold)).float()
        return weight / weight.mean().clamp_min(1e-6)

    def order(self) -> torch.Tensor:
        """Shuffle what is kept for the plain target, all samples for the residual one."""
        if self.config.target == "residual":
            return super().order()
        n_kept = self.config.entries_per_epoch()
        kept = self.buffer.coefficient.topk(n_kept).indices
        return kept[torch.randperm(n_kept, generator=self.generator, device=self.device)]
