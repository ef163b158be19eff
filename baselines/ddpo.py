"""DDPO (Black et al., ICLR 2024, arXiv 2305.13301) on the SDE sampler of a flow.

Repeat: draw samples step by step with noise, standardise their rewards per context, and follow the policy gradient of
the steps: the score function ("sf", one pass), or clipped importance ratios ("is", several passes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from flowrl.config import FlowConfig
from flowrl.functional.losses import group_mean
from flowrl.registry import register_algorithm
from flowrl.training.transitions import TransitionAlgorithm, TransitionConfig, clip_fraction, clipped_objective
from flowrl.types import Batch


@dataclass(frozen=True)
class DDPOConfig(TransitionConfig):
    """Settings of DDPO."""

    variant: Literal["is", "sf"] = "is"
    """"is": clipped importance ratios, for several updates per iteration; "sf": score function, for one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.variant in ("is", "sf"), f"variant must be 'is' or 'sf', not '{self.variant}'.")
        one_update = self.updates_per_iteration() == 1
        self.require(
            self.variant == "is" or one_update,
            "The score function is right only for the policy that drew the samples: variant 'sf' needs one gradient "
            f"step per iteration, these settings make {self.updates_per_iteration()}. Set n_epochs = 1 and "
            f"accumulation = {-(-self.rows_per_epoch() // self.batch_size)}, or variant 'is'.",
        )


@register_algorithm("ddpo")
class DDPO(TransitionAlgorithm):
    """Denoising diffusion policy optimisation."""

    Config: ClassVar[type[FlowConfig]] = DDPOConfig
    config: DDPOConfig

    def _setup_model(self) -> None:
        super()._setup_model()
        n = len(self.env.core.contexts)
        self.count, self.mean, self.square = torch.zeros(3, n, device=self.device).unbind()

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Running statistics of each context's rewards."""
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def observe(self, rollout: Batch) -> None:
        """Take new rewards into each context's running mean and sum of squared deviations (Chan et al. 1983)."""

        def total(values: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(self.count).index_add_(0, rollout.contexts, values)

        n = total(torch.ones_like(rollout.reward))
        means = group_mean(rollout.reward, rollout.contexts, len(n))  # exact where rewards agree
        mean = torch.zeros_like(n).scatter(0, rollout.contexts, means)
        square = total((rollout.reward - mean[rollout.contexts]).square())
        count = self.count + n
        step = torch.where(n > 0, mean - self.mean, 0)
        self.square += square + step.square() * self.count * n / count.clamp_min(1)
        self.mean += step * (n / count.clamp_min(1))
        self.count.copy_(count)

    def score(self, rollout: Batch) -> torch.Tensor:
        """Advantages (B,): rewards standardised by their own context's running statistics."""
        std = (self.square / self.count.clamp_min(1)).sqrt()
        advantage = (rollout.reward - self.mean[rollout.contexts]) / (std[rollout.contexts] + 1e-4)
        return advantage.clamp(-self.config.max_advantage, self.config.max_advantage)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`-A log p` or its clipped ratio, per step of the sampler."""
        steps, step = self.recorded(batch)
        if self.config.variant == "sf":
            return (-batch.weight * step.mean_log_prob(steps.x_next)).mean(), {}
        ratio = self.ratio(batch, steps, step)
        loss = clipped_objective(ratio, batch.weight, self.config.clip_range)
        return loss.mean(), {"clip_fraction": clip_fraction(ratio, self.config.clip_range)}
