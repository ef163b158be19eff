"""Methods that learn from samples without their paths: how these are drawn, and up to which times they are noised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from flowrl.config import FlowConfig
from flowrl.functional.flow import sample_time
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.types import Batch, Pair, Role, Rows


@dataclass(frozen=True)
class EndpointSamplesConfig(FlowConfig):
    """Settings of methods that noise their samples again."""

    max_time: float = 1.0
    """Largest time of the loss: beyond, towards the sample, there may be noise without signal."""
    draw_steps: int = 0
    """Solver steps of the samples to learn from, often fewer than those to show; 0 takes rollout_steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.draw_steps >= 0, f"draw_steps must not be negative, not {self.draw_steps}.")
        self.require(0 < self.max_time <= 1, f"max_time must be in (0, 1], not {self.max_time}.")


class EndpointSamples(FlowAlgorithm):
    """A `FlowAlgorithm` whose loss noises samples again."""

    Config: ClassVar[type[FlowConfig]] = EndpointSamplesConfig
    config: Any

    def draw(self, context_ids: torch.Tensor) -> tuple[torch.Tensor, Rows]:
        """Draw latents of the behaviour policy, with as many solver steps as are asked for."""
        x_0 = self.policy.noise(len(context_ids), self.generator)
        return self.drawn_from(x_0, context_ids, self.behaviour_role), {}

    def drawn_from(self, x_0: torch.Tensor, context_ids: torch.Tensor, role: Role) -> torch.Tensor:
        """Draw latents of a role from noise (B, *latent_shape)."""
        return self.policy.sample_latents(context_ids, role=role, x_0=x_0, steps=self.config.draw_steps or None)

    def pair(self, batch: Batch, x_0: torch.Tensor | None = None, t: torch.Tensor | None = None) -> Pair:
        """Pair the samples of a minibatch with fresh noise, at fresh times up to the largest; or with given ones.

        Given times (B,) are of [0, 1], and scaled.
        """
        x_0 = self.policy.noise(len(batch.x_1), self.generator) if x_0 is None else x_0
        t = sample_time(len(x_0), self.config.time_sampling, self.generator) if t is None else t
        return super().pair(batch, x_0, t if self.config.max_time == 1 else self.config.max_time * t)
