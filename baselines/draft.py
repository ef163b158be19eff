"""DRaFT (Clark et al. 2024, arXiv 2309.17400): the gradient of the reward through the last steps of the sampler.

Repeat: draw samples of the flow in training, and follow the gradient of

    r(x_1(theta)) - alpha |v - v_ref|^2

through the last K steps of the ODE that drew them; the steps before are taken without gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from flowrl.config import FlowConfig
from flowrl.registry import register_algorithm
from flowrl.training.reward_gradients import RewardGradientAlgorithm, RewardGradientConfig


@dataclass(frozen=True)
class DRaFTConfig(RewardGradientConfig):
    """Settings of DRaFT."""

    grad_steps: int = 1
    """K: how many of the sampler's last steps gradients flow through; published 1 and all of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            0 < self.grad_steps <= self.rollout_steps,
            f"grad_steps must be from 1 to rollout_steps = {self.rollout_steps}, not {self.grad_steps}.",
        )


@register_algorithm("draft")
class DRaFT(RewardGradientAlgorithm):
    """Direct reward fine-tuning."""

    kind = "gradient.sampled"
    Config: ClassVar[type[FlowConfig]] = DRaFTConfig
    config: DRaFTConfig

    def followed(self, context_ids: torch.Tensor) -> torch.Tensor:
        """Draw latents `x_1` (B, *latent_shape) with the gradient of the last K steps."""
        return self.policy.sample_latents(
            context_ids, role="current", generator=self.generator, grad_steps=self.config.grad_steps
        )
