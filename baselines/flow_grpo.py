"""Flow-GRPO (Liu et al., NeurIPS 2025, arXiv 2505.05470) and its published variants.

Repeat: draw groups of samples of the same context step by step with noise, take their rewards relative to the group
as advantages of all noisy steps, and follow PPO's clipped ratios with a KL penalty per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from flowrl.config import FlowConfig
from flowrl.functional.endpoint import advantage_slope
from flowrl.functional.sde import GaussianStep
from flowrl.registry import register_algorithm
from flowrl.training.groups import GroupConfig, GroupRelative
from flowrl.training.transitions import TransitionAlgorithm, TransitionConfig
from flowrl.types import Batch, Role, Transitions


@dataclass(frozen=True)
class FlowGRPOConfig(TransitionConfig, GroupConfig):
    """Settings of Flow-GRPO."""

    group_size: int = 8
    """Samples of the same context per iteration, whose rewards are compared; must divide n_samples."""
    beta: float = 0.04
    """Strength of the KL divergence of every step from the reference's."""
    window: int = 0
    """Noisy (and trained) steps, all others being ODE steps (MixGRPO, Flow-GRPO-Fast); 0 takes all but the last."""
    window_start: int = 0
    """First step of the window."""
    window_stride: int = 0
    """Steps by which the window slides per iteration, back to `window_start` after the end; 0 leaves it."""
    branch: bool = False
    """Samples of a group share their noise up to the window, so that they differ by its noise alone (TempFlow)."""
    step_weighting: Literal["none", "noise"] = "none"
    """"noise" weights each step by the size of its noise, mean one (TempFlow)."""
    ratio: Literal["plain", "guard"] = "plain"
    """"guard" takes the ratio whose logarithm has mean zero at every step (GRPO-Guard)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.beta >= 0, f"beta must not be negative, not {self.beta}.")
        self.require(
            self.window_start >= 0 and self.window >= 0 and self.window_stride >= 0,
            "window, window_start and window_stride must not be negative.",
        )
        end = self.window_start + self.parts()
        self.require(
            end <= self.rollout_steps - 1,
            f"The window of {self.parts()} steps from step {self.window_start} passes the last noisy step, "
            f"{self.rollout_steps - 2}.",
        )
        chunk = self.rollout_batch_size or self.n_samples
        self.require(
            not self.branch or chunk % self.group_size == 0,
            f"branch needs whole groups: group_size = {self.group_size} must divide rollout_batch_size = {chunk}.",
        )

    def check_ranks(self, count: int) -> None:
        """Check that ranks divide every batch evenly, and with branching get whole groups."""
        super().check_ranks(count)
        own = (self.rollout_batch_size or self.n_samples) // count
        self.require(
            not self.branch or own % self.group_size == 0,
            f"branch needs whole groups on each of {count} processes: group_size = {self.group_size} must divide their "
            f"{own} samples of rollout_batch_size.",
        )

    def parts(self) -> int:
        """Count the noisy steps per sample."""
        return self.window or self.rollout_steps - 1

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason."""
        if not self.window:
            return super().idle() | {"window_stride": "without window"}
        stays = self.window_start + self.window == self.rollout_steps - 1
        return super().idle() | ({"window_stride": "for a window that ends with the noisy steps"} if stays else {})


@register_algorithm("flow_grpo")
class FlowGRPO(GroupRelative, TransitionAlgorithm):
    """Group-relative policy optimisation of a flow's SDE sampler."""

    replayable = True
    tilt_setting = ("beta", -1)
    Config: ClassVar[type[FlowConfig]] = FlowGRPOConfig
    config: FlowGRPOConfig

    @classmethod
    def copies_for(cls, config: FlowGRPOConfig) -> set[Role]:
        """Keep the sampling network for the guarded ratio, which compares with its means."""
        copies = super().copies_for(config)
        return copies | {"behaviour"} if config.ratio == "guard" else copies

    def window(self) -> range:
        """Give the noisy steps of this iteration."""
        config, size = self.config, self.config.parts()
        places = config.rollout_steps - size - config.window_start  # where the window can begin
        start = config.window_start + self.iteration * config.window_stride % max(1, places)
        return range(start, start + size)

    def draw_noise(self, n: int) -> torch.Tensor:
        """Draw noise (n, *latent_shape); the same for a whole group where samples branch."""
        if not self.config.branch:
            return super().draw_noise(n)
        return super().draw_noise(n // self.config.group_size).repeat_interleave(self.config.group_size, dim=0)

    def advantage(self, rollout: Batch) -> torch.Tensor:
        """Compute advantages (B,) relative to the group; zero where all of a group agree."""
        return self.relative(rollout, self.config.max_advantage)

    def tilt_of(self, reward_std: torch.Tensor) -> torch.Tensor | None:
        """Compute `lambda = dA/dr / beta` of the law of whole paths, dA/dr as in `advantage_slope`.

        Gradient and penalty are both sums over steps, means over dimensions.
        None of several rewards that are compared each by itself, and none where the gradient, but not the penalty, is
        weighted by the noise of each step: by "noise", or by the guarded ratio, whose logarithm is that much smaller.
        """
        config = self.config
        is_one = config.reward_aggregation == "sum"
        is_even = config.step_weighting == "none" and config.ratio == "plain"
        slope = advantage_slope(reward_std, "group", config.group_size)
        return slope / config.beta if config.beta > 0 and is_one and is_even else None

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute `max(-A rho, -A clip(rho)) + beta KL(p_theta || p_ref)`, per step of the sampler."""
        config = self.config
        steps = self.recorded(batch)
        step = self.step(steps, batch.context_ids)
        ratio = self.ratio(batch, steps, step)
        objective, metrics = self.surrogate(batch, steps, step, ratio, batch.advantage)
        if config.step_weighting == "noise":
            objective = objective * self.noise_weight(steps)
        if config.beta == 0:
            return objective.mean(), metrics
        kl = step.kl(self.step(steps, batch.context_ids, "reference"))
        return (objective + config.beta * kl).mean(), {**metrics, "kl": kl.mean()}

    def ratio(self, batch: Batch, steps: Transitions, step: GaussianStep) -> torch.Tensor:
        """Compute the ratio (B,) of each step's probability now to when it was drawn, or its guarded form."""
        if self.config.ratio == "plain":
            return super().ratio(batch, steps, step)
        old = self.step(steps, batch.context_ids, "behaviour")
        log_ratio = step.mean_log_prob(steps.x_next) - old.mean_log_prob(steps.x_next)
        distance = (step.mean - old.mean).square().flatten(1).mean(1)
        return (step.std * log_ratio + distance / (2 * step.std)).exp()

    def noise_weight(self, steps: Transitions) -> torch.Tensor:
        """Compute the standard deviation of each step's noise (B,), in units of its mean over the window."""
        times = self.policy.times()
        window = torch.tensor(list(self.window()), device=times.device)

        def std(k: torch.Tensor) -> torch.Tensor:
            return self.sde.std(times[k], times[k + 1])

        return std(steps.k) / std(window).mean()
