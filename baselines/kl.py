"""The exact-likelihood KL baseline: reward-weighted flow matching on `r - beta (log p_theta - log p_ref)`.

Likelihoods are computed by the instantaneous change of variables for every sample of every iteration: what `orw_kl`
gets from the velocities alone, at many times its cost. The fixed point is `q_ref e^{r / beta}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from flowrl.config import FlowConfig
from flowrl.functional.likelihood import Divergence, log_prob
from flowrl.orw_w2 import ORWCFMW2, ORWConfig
from flowrl.registry import register_algorithm
from flowrl.types import Batch, Role, Rows


@dataclass(frozen=True)
class ExactKLConfig(ORWConfig):
    """Settings of the exact-likelihood KL baseline."""

    beta: float = 1.0
    """Strength of the KL divergence from the reference."""
    divergence: Divergence = "auto"
    """Divergence of the velocity: exact, Hutchinson's estimate, or exact in low dimension ("auto")."""
    n_probes: int = 1
    """Random vectors of Hutchinson's estimate."""
    tolerance: float = 1e-2
    """Relative tolerance of the adaptive solver; the absolute one is a tenth of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.beta >= 0, f"beta must not be negative, not {self.beta}.")
        for name in ("n_probes", "tolerance"):
            self.require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}.")

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason."""
        return super().idle() | ({"n_probes": "for the exact divergence"} if self.divergence == "exact" else {})


@register_algorithm("kl")
class ExactKL(ORWCFMW2):
    """Reward-weighted flow matching on the reward minus beta times the exact log-likelihood ratio."""

    Config: ClassVar[type[FlowConfig]] = ExactKLConfig
    kind = "likelihood"
    draws_ahead = True
    tilt_setting = ("beta", -1)
    unpredictable = "likelihoods, by a solver with adaptive steps"
    config: ExactKLConfig
    n_drawn = 0  # samples of this iteration that were drawn before, over all ranks; the buffer may still lack them

    def contexts(self) -> torch.Tensor:
        """Draw contexts as others do, and begin to count the samples of an iteration."""
        self.n_drawn = 0
        return super().contexts()

    def draw(self, context_ids: torch.Tensor) -> tuple[torch.Tensor, Rows]:
        """Draw latents, with the log-likelihood ratio `log p_theta - log p_ref` of each."""
        x_1, rows = super().draw(context_ids)
        ratio = self.log_prob(x_1, context_ids, self.behaviour_role) - self.log_prob(x_1, context_ids, "reference")
        self.n_drawn += len(context_ids) * self.ranks.world_size
        return x_1, {**rows, "log_ratio": ratio}

    def tilt_of(self, reward_std: torch.Tensor) -> torch.Tensor | None:
        """Compute the lambda of the tilt that is aimed at: 1 / beta, in whatever units tau is."""
        return torch.ones_like(reward_std) / self.config.beta if self.config.beta > 0 else None

    def weigh(self, rollout: Batch) -> torch.Tensor:
        """Compute weights (B,) of `r - beta (log p_theta - log p_ref)`, as of a reward."""
        return super().weigh(rollout._replace(reward=rollout.reward - self.config.beta * rollout.extra["log_ratio"]))

    def log_prob(self, x_1: torch.Tensor, context_ids: torch.Tensor, role: Role) -> torch.Tensor:
        """Compute the log-likelihood (B,) of samples in the flow's own space; the same random signs for every role."""
        config, ranks, parts = self.config, self.ranks, []
        chunk = config.batch_size // ranks.world_size
        first = self.n_drawn + ranks.rank * len(x_1)  # among the samples of the iteration
        for i, (samples, ids) in enumerate(zip(x_1.split(chunk), context_ids.split(chunk))):
            generator = torch.Generator(x_1.device).manual_seed(self.iteration * 100_003 + first + i)
            field = self.policy.field(self.policy.condition(ids), len(samples), role)
            parts.append(
                log_prob(
                    field,
                    samples,
                    divergence=config.divergence,
                    n_probes=config.n_probes,
                    rtol=config.tolerance,
                    atol=config.tolerance / 10,
                    generator=generator,
                )
            )
        return torch.cat(parts)
