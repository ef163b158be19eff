"""What policy gradients on the steps of an SDE sampler share: recording the steps, and their ratios.

Each noisy step of the sampler is an action of a Markov decision process: state `(x_k, t_k, c)`, Gaussian policy, the
reward at the end (Black et al. 2024, Fan et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from flowrl.config import FlowConfig
from flowrl.functional.solvers import SDE, GaussianStep, SDEKind
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.types import Batch, Transitions


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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.rollout_steps > 1, "rollout_steps must be at least 2: the last step is never noisy.")
        self.require(self.solver == "euler", f"An SDE sampler takes Euler steps, not '{self.solver}'.")
        for name in ("clip_range", "max_advantage"):
            self.require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}.")
        SDE(self.sde, self.noise_level)  # raises for settings without meaning

    def path_steps(self) -> int:
        """Noisy steps per sample."""
        return self.rollout_steps - 1


class TransitionAlgorithm(FlowAlgorithm):
    """A `FlowAlgorithm` whose minibatches are steps of the sampler (`batch.transitions`), not samples."""

    Config: ClassVar[type[FlowConfig]] = TransitionConfig
    config: TransitionConfig

    @property
    def sde(self) -> SDE:
        """The sampler's noise."""
        return SDE(self.config.sde, self.config.noise_level)

    def window(self) -> range:
        """The noisy steps of this iteration."""
        return range(self.config.path_steps())

    def draw_noise(self, n: int) -> torch.Tensor:
        """Noise (n, *latent_shape) at the start of `n` samples."""
        return self.policy.noise(n, self.generator)

    def draw_latents(self, contexts: torch.Tensor) -> torch.Tensor:
        """Latents by the SDE; the noisy steps go into the buffer."""
        window = self.window()
        x_1, states, log_prob = self.policy.sample_path(
            contexts,
            self.sde,
            role=self.behaviour_role,
            window=window,
            generator=self.generator,
            x_0=self.draw_noise(len(contexts)),
        )
        self.buffer.add_path(states, log_prob, window.start)
        return x_1

    def minibatches(self) -> Iterator[Batch]:
        """One pass over all recorded steps."""
        return self.buffer.transition_minibatches(self.config.batch_size, self.generator)

    def recorded(self, batch: Batch) -> tuple[Transitions, GaussianStep]:
        """The recorded steps of a minibatch, and their law under the current network."""
        assert batch.transitions is not None
        return batch.transitions, self.policy.transition(batch.transitions, batch.contexts, self.sde)

    def reference_step(self, batch: Batch) -> GaussianStep:
        """The law of the recorded steps under the reference."""
        assert batch.transitions is not None
        return self.policy.transition(batch.transitions, batch.contexts, self.sde, "reference")

    def ratio(self, batch: Batch, steps: Transitions, step: GaussianStep) -> torch.Tensor:
        """Ratio (B,) of each step's probability now to when it was drawn."""
        return (step.mean_log_prob(steps.x_next) - steps.log_prob).exp()


def clipped_objective(ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> torch.Tensor:
    """PPO's pessimistic surrogate as a loss (B,): `max(-A rho, -A clip(rho, 1 - c, 1 + c))` (Schulman et al. 2017)."""
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def clip_fraction(ratio: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Share of ratios outside the clip range; a scalar tensor."""
    return ((ratio - 1).abs() > clip_range).float().mean()
