"""Methods that follow the gradient of the reward through samples that they draw themselves."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from flowrl.config import FlowConfig
from flowrl.functional.losses import squared_error
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.types import Batch


@dataclass(frozen=True)
class RewardGradientConfig(FlowConfig):
    """Settings of methods that follow the reward's gradient."""

    alpha: float = 0.0
    """Strength of |v - v_ref|^2 between the samples and noise; 0, as published: nothing but time holds the flow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.alpha >= 0, f"alpha must not be negative, not {self.alpha}.")

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason."""
        of_rollouts = ("refresh_every", "half_buffer", "rollout_batch_size", "overlap_rewards", "offload")
        found = dict.fromkeys(of_rollouts, "for samples that are drawn anew for each update, batch_size at a time")
        return super().idle() | found | ({} if self.alpha else {"time_sampling": "without alpha"})


class RewardGradientAlgorithm(FlowAlgorithm):
    """A `FlowAlgorithm` whose loss is minus the reward of samples with a gradient, which the reward must have."""

    Config: ClassVar[type[FlowConfig]] = RewardGradientConfig
    kind = "gradient"
    learns_from = "contexts"
    needs_gradient = True
    config: RewardGradientConfig

    @abstractmethod
    def followed(self, context_ids: torch.Tensor) -> torch.Tensor:
        """Draw latents `x_1` (B, *latent_shape) of the current network, with the gradient that is followed."""

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute minus the mean reward, and the penalty."""
        x_1 = self.followed(batch.context_ids)
        loss = -self.reward_of(x_1, batch.context_ids).mean()
        if self.config.alpha == 0:
            return loss, {}
        pair = self.pair(Batch.of(x_1.detach(), batch.context_ids))
        drift = squared_error(self.velocity(pair), self.velocity(pair, "reference")).mean()
        return loss + self.config.alpha * drift, {"drift": drift}
