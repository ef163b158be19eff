"""FPO: flow matching policy gradients (McAllister et al. 2025, arXiv 2507.21053), and V-GRPO (arXiv 2604.23380).

Repeat: draw groups of samples of the same context by the ODE, and keep for each a few draws of noise and time with the
flow-matching error there; then follow PPO's clipped ratios, with the error in the place of the log-likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from flowrl.config import FlowConfig
from flowrl.functional.endpoint import stratified_times
from flowrl.functional.flow import sample_time
from flowrl.functional.losses import clip_fraction, clipped_objective
from flowrl.registry import register_algorithm
from flowrl.training.endpoint_samples import EndpointSamples, EndpointSamplesConfig
from flowrl.training.groups import GroupConfig, GroupRelative
from flowrl.types import Batch, Role, Rows


@dataclass(frozen=True)
class FPOConfig(GroupConfig, EndpointSamplesConfig):
    """Settings of FPO."""

    draws: int = 8
    """Draws of noise and time that are kept of each sample; the ratio of a single one is biased upwards."""
    clip_range: float = 0.05
    """Ratios beyond 1 +- this get no gradient."""
    shared: bool = False
    """Samples of a group share their draws, at times spread evenly over [0, 1] (V-GRPO)."""
    error: Literal["velocity", "noise"] = "velocity"
    """Error that stands for the log-likelihood: |v - u|^2, or that of the predicted noise, t^2 |v - u|^2."""
    max_advantage: float = 5.0
    """Advantages are clipped at this size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("draws", "clip_range", "max_advantage"):
            self.require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}.")
        self.check_chunk(1)

    def check_ranks(self, count: int) -> None:
        """Check that ranks divide every batch evenly, and where draws are shared get whole groups."""
        super().check_ranks(count)
        self.check_chunk(count)

    def check_chunk(self, count: int) -> None:
        """Check that samples drawn at once on each of `count` processes are whole groups, where those share draws.

        Raises:
            ConfigError: They are not.
        """
        own = (self.rollout_batch_size or self.n_samples) // count
        self.require(
            not self.shared or own % self.group_size == 0,
            f"shared draws need whole groups: group_size = {self.group_size} must divide the {own} samples of "
            f"rollout_batch_size that each of {count} processes draws at once.",
        )


@register_algorithm("fpo")
class FPO(EndpointSamples, GroupRelative):
    """PPO whose log-likelihood is the flow-matching error at kept draws of noise and time."""

    replayable = True
    draws_ahead = True
    Config: ClassVar[type[FlowConfig]] = FPOConfig
    kind = "endpoint-free.ratio"
    config: FPOConfig

    def tilt_of(self, reward_std: torch.Tensor) -> torch.Tensor | None:
        """Give nothing: no penalty holds the flow, and how far it goes is decided by how long a run goes on."""
        return None

    def draw(self, context_ids: torch.Tensor) -> tuple[torch.Tensor, Rows]:
        """Draw latents, and of each noise (B, N, ...) and times (B, N) that are kept, with the errors (B, N) there."""
        x_1, rows = super().draw(context_ids)
        config = self.config
        size = config.group_size if config.shared else 1
        n = len(x_1) // size
        x_0 = torch.stack([self.policy.noise(n, self.generator) for _ in range(config.draws)], 1)
        if config.shared:
            t = stratified_times(n, config.draws, config.time_sampling, self.generator).view(n, config.draws)
        else:
            t = torch.stack([sample_time(n, config.time_sampling, self.generator) for _ in range(config.draws)], 1)
        x_0, t = x_0.repeat_interleave(size, dim=0), t.repeat_interleave(size, dim=0)
        kept = x_1.half().float() if config.half_buffer else x_1  # as minibatches get them
        with torch.no_grad():
            old = self.kept_errors(Batch.of(kept, context_ids), x_0, t, self.behaviour_role)
        return x_1, {**rows, "x_0": x_0, "t": t, "old": old}

    def advantage(self, rollout: Batch) -> torch.Tensor:
        """Compute advantages (B,) relative to the group; zero where all of a group agree."""
        return self.relative(rollout, self.config.max_advantage)

    def kept_errors(self, batch: Batch, x_0: torch.Tensor, t: torch.Tensor, role: Role = "current") -> torch.Tensor:
        """Compute the errors (B, N) of samples at their draws of noise (B, N, ...) and time (B, N).

        One draw after the other: no forward pass is larger than that of a minibatch. Adapters are left apart from the
        weights, so that ratios start at exactly one.
        """
        columns = []
        for i in range(t.shape[1]):
            pair = self.pair(batch, x_0[:, i], t[:, i])
            v = self.policy.velocity(pair.x_t, pair.t, pair.cond, role, exact=True)
            error = (v - pair.u).square().flatten(1).mean(1)
            columns.append(error if self.config.error == "velocity" else pair.t.square() * error)
        return torch.stack(columns, 1)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute `max(-A rho, -A clip(rho))`, `rho = exp(mean over draws of d_old - d)`."""
        x_0, t, old = (batch.extra[name] for name in ("x_0", "t", "old"))
        ratio = (old - self.kept_errors(batch, x_0, t)).mean(1).exp()
        loss = clipped_objective(ratio, batch.advantage, self.config.clip_range)
        return loss.mean(), {"ratio": ratio.mean(), "clip_fraction": clip_fraction(ratio, self.config.clip_range)}
