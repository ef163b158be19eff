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
from flowrl.training.transitions import TransitionAlgorithm, TransitionConfig
from flowrl.types import Batch


@dataclass(frozen=True)
class DDPOConfig(TransitionConfig):
    """Settings of DDPO."""

    variant: Literal["is", "sf"] = "is"
    """"is": clipped importance ratios, for several updates per iteration; "sf": score function, for one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.variant in ("is", "sf"), f"variant must be 'is' or 'sf', not '{self.variant}'.")
        self.require(self.variant == "is" or self.mask == "none", "mask 'dppo' masks ratios: it needs variant 'is'.")
        self.require(
            self.variant == "is" or self.refresh_every == 1,
            "The score function is right only for the policy that drew the samples, which lags behind the trained one "
            f"with refresh_every = {self.refresh_every}: set refresh_every = 1, or variant 'is'.",
        )
        one_update = self.updates_per_iteration() == 1
        self.require(
            self.variant == "is" or one_update,
            "The score function is right only for the policy that drew the samples: variant 'sf' needs one gradient "
            f"step per iteration, these settings make {self.updates_per_iteration()}. Set n_epochs = 1 and "
            f"accumulation = {-(-self.entries_per_epoch() // self.batch_size)}, or variant 'is'.",
        )

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason."""
        return super().idle() | ({"clip_range": "unless variant is 'is'"} if self.variant == "sf" else {})


@register_algorithm("ddpo")
class DDPO(TransitionAlgorithm):
    """Denoising diffusion policy optimisation."""

    replayable = True
    Config: ClassVar[type[FlowConfig]] = DDPOConfig
    kind = "steps-free"
    config: DDPOConfig

    def _setup_model(self) -> None:
        super()._setup_model()
        n = len(self.env.core.contexts)
        self.count, self.mean, self.square = (self.keep(name, torch.zeros(n)) for name in ("count", "mean", "square"))

    def _take_in(self, rollout: Batch) -> None:
        """Take new rewards into each context's running mean and sum of squared deviations (Chan et al. 1983)."""

        def total(values: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(self.count).index_add_(0, rollout.context_ids, values)

        n = total(torch.ones_like(rollout.reward))
        means = group_mean(rollout.reward, rollout.context_ids, len(n))  # exact where rewards agree
        mean = torch.zeros_like(n).scatter(0, rollout.context_ids, means)
        square = total((rollout.reward - mean[rollout.context_ids]).square())
        count = self.count + n
        step = torch.where(n > 0, mean - self.mean, 0)
        self.square += square + step.square() * self.count * n / count.clamp_min(1)
        self.mean += step * (n / count.clamp_min(1))
        self.count.copy_(count)

    def advantage(self, rollout: Batch) -> torch.Tensor:
        """Standardise rewards (B,) by their own context's running statistics, which take them in first."""
        self._take_in(rollout)
        std = (self.square / self.count.clamp_min(1)).sqrt()
        advantage = (rollout.reward - self.mean[rollout.context_ids]) / (std[rollout.context_ids] + 1e-4)
        return advantage.clamp(-self.config.max_advantage, self.config.max_advantage)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute `-A log p` or its clipped ratio, per step of the sampler."""
        steps, advantage = self.recorded(batch), batch.advantage
        step = self.step(steps, batch.context_ids)
        if self.config.variant == "sf":
            return (-advantage * step.mean_log_prob(steps.x_next)).mean(), {}
        loss, figures = self.surrogate(batch, steps, step, self.ratio(batch, steps, step), advantage)
        return loss.mean(), figures

    def tilt_of(self, reward_std: torch.Tensor) -> torch.Tensor | None:
        """Give nothing: no penalty holds the flow, and how far it goes is decided by how long a run goes on."""
        return None
