"""Methods that learn from samples without their paths: who draws these, and up to which times they are noised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from flowrl.config import FlowConfig
from flowrl.errors import ConfigError
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
    max_own_loss: float = 0.0
    """Refresh the behaviour policy only while the loss of the flow's own samples is at most this times the reference's
    loss of the same (train/own_loss, train/reference_loss): beyond, errors would grow from refresh to refresh. 0 sets
    no limit."""
    max_drift: float = 0.0
    """Refresh the behaviour policy only while train/drift, E|v - v_ref|^2 on the flow's own samples, is at most this
    times train/reference_loss, E|u - v_ref|^2 on the same: a trust region around the reference. 0 sets no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_own_loss", "max_drift"):
            self.require(getattr(self, name) >= 0, f"{name} must not be negative, not {getattr(self, name)}.")
        self.require(self.draw_steps >= 0, f"draw_steps must not be negative, not {self.draw_steps}.")
        self.require(0 < self.max_time <= 1, f"max_time must be in (0, 1], not {self.max_time}.")


class EndpointSamples(FlowAlgorithm):
    """A `FlowAlgorithm` whose loss noises samples again, and whose refreshes may be held."""

    draws_ahead = True
    Config: ClassVar[type[FlowConfig]] = EndpointSamplesConfig
    config: Any
    held_by = ""

    @classmethod
    def copies_for(cls, config: Any) -> set[Role]:
        """Keep the policy that draws the samples where it may stay as it is."""
        copies = super().copies_for(config)
        return copies | {"behaviour"} if config.max_own_loss or config.max_drift else copies

    def _setup_model(self) -> None:
        super()._setup_model()
        if (self.config.max_own_loss or self.config.max_drift) and self.behaviour_role != "behaviour":
            raise ConfigError(
                f"'{self.name}' draws samples from its {self.behaviour_role} policy, which max_own_loss and max_drift "
                "do not hold: leave them at 0."
            )

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

    def update(self) -> dict[str, torch.Tensor]:
        """Improve the policy, and measure what may hold the refresh; that is part of the method's cost."""
        figures = super().update()
        holds = self.config.max_own_loss or self.config.max_drift
        return {**self.drift(), **figures} if holds and "own_loss" not in figures else figures

    def may_refresh(self, figures: Mapping[str, torch.Tensor]) -> bool:
        """Tell whether the loss of own samples and the drift are small enough for a refresh."""
        limits = {"own_loss": self.config.max_own_loss, "drift": self.config.max_drift}
        if not any(limits.values()):
            return True
        found = self.ranks.mean_(torch.stack([figures[name] for name in (*limits, "reference_loss")])).tolist()
        values = dict(zip(limits, found))
        beyond = [name for name, limit in limits.items() if limit and values[name] > limit * found[-1]]
        self.held_by = beyond[0] if beyond else ""
        return not beyond

    def cautions(self, logged: Mapping[str, Any]) -> dict[str, str]:
        """Tell of a behaviour policy that stays as it is."""
        if not self.held_by:
            return super().cautions(logged)
        limit = getattr(self.config, f"max_{self.held_by}")
        what = "the loss of its own samples" if self.held_by == "own_loss" else "its drift on its own samples"
        text = (
            f"The policy that draws samples was not refreshed after iteration {self.iteration}: {what} is more than "
            f"{limit:g} times the reference's loss of the same (max_{self.held_by}), and errors would grow. Training "
            "goes on with samples of the policy as it was, and refreshes it once that is mended."
        )
        return {**super().cautions(logged), "held": text}
