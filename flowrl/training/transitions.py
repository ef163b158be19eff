"""Transitions: policy gradients on the steps of an SDE sampler, which are recorded and compared by their ratios.

Each noisy step of the sampler is an action of a Markov decision process: state `(x_k, t_k, c)`, Gaussian policy, the
reward at the end (Black et al. 2024, Fan et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from flowrl.config import FlowConfig
from flowrl.errors import ConfigError
from flowrl.functional.advantages import trusted
from flowrl.functional.losses import clip_fraction, clipped_objective
from flowrl.functional.sde import SDE, GaussianStep, SDEKind
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.types import Batch, Role, Rows, Transitions


@dataclass(frozen=True)
class TransitionConfig(FlowConfig):
    """Settings of algorithms on the steps of an SDE sampler."""

    rollout_steps: int = 10
    """Sampler steps of a rollout; all but the last are noisy and trained."""
    sde: SDEKind = "flow"
    """Noise of the rollouts: "flow" (Flow-GRPO), "constant" (DanceGRPO) or "cps" (coefficient-preserving)."""
    noise_level: float = 0.7
    """Size a of that noise."""
    clip_range: float = 1e-4
    """Ratios of step probabilities beyond 1 +- this get no gradient. Log-probabilities are means over dimensions."""
    max_advantage: float = 5.0
    """Advantages are clipped at this size."""
    mask: Literal["none", "dppo"] = "none"
    """What keeps steps near the policy that drew them: the clip of ratios alone ("none"), or in its place a mask of
    those that have gone too far and move farther out ("dppo", Flow-DPPO), which lets one rollout serve more epochs."""
    dppo_delta: float = 1e-5
    """How far is too far for the mask: KL divergence of a step from the one that was drawn, mean over dimensions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.rollout_steps > 1, "rollout_steps must be at least 2: the last step is never noisy.")
        self.require(self.solver == "euler", f"An SDE sampler takes Euler steps, not '{self.solver}'.")
        for name in ("clip_range", "max_advantage", "dppo_delta"):
            self.require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}.")
        SDE(self.sde, self.noise_level)  # raises for settings without meaning

    def parts(self) -> int:
        """Count the noisy steps per sample."""
        return self.rollout_steps - 1

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason."""
        found = {"clip_range": "with mask 'dppo'"} if self.mask == "dppo" else {"dppo_delta": "unless mask is 'dppo'"}
        return super().idle() | found | {"time_sampling": "for a loss at the sampler's own times"}


class TransitionAlgorithm(FlowAlgorithm):
    """A `FlowAlgorithm` on steps of the sampler: minibatches consist of steps (see `recorded`), not of samples."""

    Config: ClassVar[type[FlowConfig]] = TransitionConfig
    kind = "steps"
    learns_from = "steps"
    draws_ahead = True
    config: TransitionConfig

    @classmethod
    def copies_for(cls, config: Any) -> set[Role]:
        """Keep the policy that drew the steps for the mask, which compares means with its own.

        They are computed again from this copy, one evaluation a step. Rows of them would take as much memory as the
        recorded states once more; the copy is of what is trained alone, with LoRA the adapters.
        """
        copies = super().copies_for(config)
        return copies | {"behaviour"} if config.mask == "dppo" else copies

    @property
    def sde(self) -> SDE:
        """The sampler's noise."""
        return SDE(self.config.sde, self.config.noise_level)

    def window(self) -> range:
        """Give the noisy steps of this iteration."""
        return range(self.config.parts())

    def draw_noise(self, n: int) -> torch.Tensor:
        """Draw noise (n, *latent_shape) for the start of `n` samples."""
        return self.policy.noise(n, self.generator)

    def draw(self, context_ids: torch.Tensor) -> tuple[torch.Tensor, Rows]:
        """Draw latents by the SDE, with the states and log-probabilities of their noisy steps."""
        window = self.window()
        x_1, states, log_prob = self.policy.sample_path(
            context_ids,
            self.sde,
            role=self.behaviour_role,
            window=window,
            generator=self.generator,
            x_0=self.draw_noise(len(context_ids)),
        )
        first = torch.full((len(x_1),), window.start, device=x_1.device)
        return x_1, {"states": states, "log_prob": log_prob, "first_step": first}

    @staticmethod  # or the buffer, which is given it, would hold the model
    def read(rows: Rows, sample: torch.Tensor, part: torch.Tensor) -> Rows:
        """Read the state before and after each step, and its log-probability."""
        return {
            "x_1": rows["x_1"][sample],
            "x_k": rows["states"][sample, part],
            "x_next": rows["states"][sample, part + 1],
            "log_prob": rows["log_prob"][sample, part],
        }

    def recorded(self, batch: Batch) -> Transitions:
        """Give the recorded steps of a minibatch."""
        extra = batch.extra
        return Transitions(extra["x_k"], extra["x_next"], extra["first_step"] + extra["part"], extra["log_prob"])

    def step(self, steps: Transitions, context_ids: torch.Tensor, role: Role = "current") -> GaussianStep:
        """Compute the law of recorded steps under a role's network now, with the sampler's own times and guidance."""
        policy, times = self.policy, self.policy.times()
        t, t_next = times[steps.k], times[steps.k + 1]
        field = policy.field(policy.condition(context_ids), len(context_ids), role, exact=True)
        v = field(steps.x_k, t)
        return self.sde.step(v, steps.x_k, t, t_next)

    def update(self) -> dict[str, torch.Tensor]:
        """Take gradient steps on the recorded steps; in low precision, measure first how far ratios start from one.

        Raises:
            ConfigError: They start farther from it than the clip range.
        """
        if self.config.precision == "float32":
            return super().update()
        floor = self.ratio_floor()
        clips = "clip_range" not in self.config.idle()
        if self.iteration == 0 and clips and float(floor) > self.config.clip_range:
            raise ConfigError(
                f"clip_range = {self.config.clip_range:g} is below {float(floor):.1g}, by which ratios in "
                f"{self.config.precision} differ from one before anything is learnt: rounding alone would clip them. "
                "Take precision float32, or a wider clip_range."
            )
        return {**super().update(), "ratio_floor": floor}

    @torch.no_grad()
    def ratio_floor(self) -> torch.Tensor:
        """Measure `|log p - log p_old|` before any update, the mean over a minibatch of steps; a scalar tensor."""
        n = self.buffer.size * self.buffer.parts
        batch = next(self.buffer.batches(torch.arange(n, device=self.device), self.config.batch_size))
        steps = self.recorded(batch)
        with self.policy.uncounted():
            return (self.step(steps, batch.context_ids).mean_log_prob(steps.x_next) - steps.log_prob).abs().mean()

    def ratio(self, batch: Batch, steps: Transitions, step: GaussianStep) -> torch.Tensor:
        """Compute the ratio (B,) of each step's probability now to when it was drawn."""
        return (step.mean_log_prob(steps.x_next) - steps.log_prob).exp()

    def surrogate(
        self, batch: Batch, steps: Transitions, step: GaussianStep, ratio: torch.Tensor, advantage: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss (B,) of ratios and advantages (B,), clipped or masked, and the share that this leaves out.

        Clipped: `max(-A rho, -A clip(rho))`. Masked: `-A rho` where `trusted` of `D = |mu - mu_old|^2 / (2 sigma^2)`.
        """
        config = self.config
        if config.mask == "none":
            loss = clipped_objective(ratio, advantage, config.clip_range)
            return loss, {"clip_fraction": clip_fraction(ratio, config.clip_range)}
        divergence = step.kl(self.step(steps, batch.context_ids, "behaviour"))
        kept = trusted(ratio, advantage, divergence, config.dppo_delta)
        return torch.where(kept, -advantage * ratio, 0), {"masked": 1 - kept.float().mean()}
