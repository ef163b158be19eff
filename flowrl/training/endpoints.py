"""Endpoint methods with advantages: rewards of a group compared, samples noised again, one kernel for the gradient."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from flowrl.config import FlowConfig
from flowrl.functional.endpoint import (
    Row,
    Spread,
    advantage_slope,
    advantages,
    endpoint_loss,
    lagging_decay,
    stratified_times,
)
from flowrl.functional.losses import means, squared_error, squared_errors, weighed
from flowrl.models.critic import StateCritic
from flowrl.training.groups import GroupConfig, GroupRelative
from flowrl.training.noising import some_rows
from flowrl.training.priority import Prioritised, PriorityConfig
from flowrl.training.reward_calls import counts
from flowrl.types import Batch, Pair, Role

FIGURES: Mapping[Role, str] = {"reference": "drift", "behaviour": "move"}
"""Figures of an update, `|v - v_role|^2`, by role."""


@dataclass(frozen=True)
class EndpointConfig(GroupConfig, PriorityConfig, ABC):
    """Settings of endpoint methods with advantages."""

    spread: Spread = "group"
    """Unit of advantages: the standard deviation of the rewards of their group ("group"), of all rewards of the
    iteration ("global"), or none: the rewards' own ("none")."""
    max_advantage: float = 5.0
    """Advantages are clipped at this size."""
    noisings: int = 1
    """How often each sample of a minibatch is noised, at times of as many equal parts of [0, 1]; costs as much."""
    early_times: bool = False
    """Draw flow times with density 2 (1 - t), near the noise, in place of time_sampling."""
    decay_flat: int = 0
    """Iterations after which the old policy, which draws the samples, begins to lag."""
    decay_rate: float = 0.0
    """By how much the share that a refresh keeps of the old policy grows per iteration; 0 copies the trained one."""
    decay_hold: float = 0.0
    """Largest share of the old policy that a refresh keeps."""
    critic_learning_rate: float = 0.0
    """Learning rate of a critic that learns E[A | x_t] and takes it off the advantages, in no method as published: then
    errors of the field do not grow from refresh to refresh. 0 has none."""
    critic_width: int = 128
    """Width of the critic, a perceptron with two hidden layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.reward_aggregation == "sum" or self.spread != "none",
            "reward_aggregation 'gdpo' gives each of several rewards its own unit: take spread 'group' or 'global'.",
        )
        for name in ("max_advantage", "noisings", "critic_width"):
            self.require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}.")
        for name in ("decay_flat", "decay_rate", "critic_learning_rate"):
            self.require(getattr(self, name) >= 0, f"{name} must not be negative, not {getattr(self, name)}.")
        self.require(0 <= self.decay_hold < 1, f"decay_hold must be in [0, 1), not {self.decay_hold}.")

    @abstractmethod
    def row(self) -> Row:
        """Give the method's row of the table of endpoint methods."""

    @property
    def lags(self) -> bool:
        """Whether the old policy is not just a copy of the trained one."""
        return self.decay_rate > 0 and self.decay_hold > 0

    def caution(self) -> str:
        """Say why the loss need not have a minimum, and the remedy; nothing where it has one."""
        row = self.row()
        most, anchors = row.gain * self.max_advantage, sum(row.anchors.values())
        if anchors > 0 and (self.critic_learning_rate > 0 or row.curvature(-self.max_advantage) > -1e-9 * most):
            return ""
        held = f"only {anchors:g}" if anchors else "nothing"
        return (
            f"The loss need not have a minimum: where most samples of a point have negative advantages, down to "
            f"-{most:g} in the gradient, {held} holds the velocity, which then runs away."
        )

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason."""
        found = super().idle() | ({} if self.critic_learning_rate else {"critic_width": "without critic_learning_rate"})
        if not self.decay_hold:
            found |= dict.fromkeys(("decay_flat", "decay_rate"), "without decay_hold")
        if not self.decay_rate:
            found |= dict.fromkeys(("decay_flat", "decay_hold"), "without decay_rate")
        return found | ({"time_sampling": "with early_times"} if self.early_times else {})


class EndpointAlgorithm(Prioritised, GroupRelative):
    """A `FlowAlgorithm` with advantages, whose loss is a row of `flowrl.functional.endpoint`."""

    Config: ClassVar[type[FlowConfig]] = EndpointConfig
    kind = "advantages"
    config: EndpointConfig

    @classmethod
    def copies_for(cls, config: Any) -> set[Role]:
        """Keep the old policy where it lags, or where the method compares with it."""
        row, copies = config.row(), super().copies_for(config)
        needed = config.lags or row.base == "behaviour" or bool(row.anchors.get("behaviour", 0.0))
        return copies | {"behaviour"} if needed else copies

    def _setup_model(self) -> None:
        if (text := self.config.caution()) and self.ranks.is_main:
            warnings.warn(text, stacklevel=4)
        super()._setup_model()
        config, dim = self.config, torch.Size(self.policy.model.latent_shape).numel()
        self.critic = None
        if config.critic_learning_rate > 0:
            critic = StateCritic(dim, len(self.env.core.contexts), config.critic_width)
            self.critic = self.add_network("critic", critic, config.critic_learning_rate)

    def refresh_decay(self) -> float:
        """Give the share of the old policy that a refresh keeps, which grows from `decay_flat` on to `decay_hold`."""
        config = self.config
        return lagging_decay(self.iteration, config.decay_flat, config.decay_rate, config.decay_hold)

    def compared(self, reward: torch.Tensor, group: torch.Tensor, maximum: float) -> torch.Tensor:
        """Compare one reward (B,) within groups (B,): advantages (B,) in units of the spread."""
        return advantages(reward, group, self.config.spread, maximum)

    def advantage(self, rollout: Batch) -> torch.Tensor:
        """Compare the rewards of each group: advantages (B,)."""
        return self.relative(rollout, self.config.max_advantage)

    def noised(self, batch: Batch) -> tuple[Batch, Pair]:
        """Pair the samples of a minibatch with noise, each `noisings` times; gives the rows of the pairs, too."""
        config, n = self.config, len(batch.x_1)
        kind = "early" if config.early_times else config.time_sampling
        size = 2 if config.paired_noise else 1  # neighbours that have noise and time in common
        t = stratified_times(n // size, config.noisings, kind, self.generator).repeat_interleave(size)
        if config.noisings > 1:
            row = torch.arange(n, device=self.device).view(-1, 1, size).expand(-1, config.noisings, size).flatten()
            batch = some_rows(batch, row)
        batch, x_0 = self.couple(batch)
        return batch, self.pair(batch, x_0, t)

    def follow(
        self,
        row: Row,
        batch: Batch,
        pair: Pair,
        advantage: torch.Tensor,
        velocities: Mapping[Role, torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss whose gradient is a row's, and its figures.

        Args:
            row: Base, anchors and gain; anchors of gain zero are left out.
            batch: The samples.
            pair: The noised samples.
            advantage: A (B,).
            velocities: "current", with its gradient, and whatever else is known already, by role.
        """
        row = row._replace(anchors={r: g for r, g in row.anchors.items() if isinstance(g, torch.Tensor) or g})
        known = dict(velocities)
        for role in (row.base, *row.anchors):
            if role not in known:
                known[role] = self.velocity(pair, self.behaviour_role if role == "behaviour" else role)
        v, importance = known["current"], self.importance(batch)
        fields = {name: known[role] for role, name in FIGURES.items() if role in known}
        if "reference" in known:
            fields["own_loss"] = pair.u
        rows = dict(zip(fields, squared_errors(v.detach(), *fields.values()))) if fields else {}
        if "reference" in known:
            rows["reference_loss"] = squared_error(known["reference"], pair.u)
        figures = means(rows, importance) if rows else {}
        if self.critic is not None:
            state = pair.x_t, pair.t, batch.context_ids
            value, figures["critic_error"] = self.critic.regress(advantage, importance * counts(batch), *state)
            advantage = advantage - value
        advantage = weighed(advantage, counts(batch))  # no advantage is to carry nothing
        weight = self.time_weight(pair, known[row.base], importance)
        loss = weighed(endpoint_loss(v, row.gradient(pair.u, advantage, known, weight)), importance)
        return loss.mean(), figures

    def tilt_of(self, reward_std: torch.Tensor) -> torch.Tensor | None:
        """Give lambda of the tilt `q_ref e^(lambda r) / Z` that the method aims at; None where there is none.

        Where v_old is the field of its own samples, all rows but those around the reference stand still where
        `E[gain A (u - v) | x_t] = beta_ref (v - v_ref)`: for linear rewards on a Gaussian that is the tilt by

            lambda = gain dA/dr / beta_ref

        (for concave rewards early times are tilted less, see docs/algorithms/ram.md). dA/dr is that of
        `advantage_slope`, where nothing is clipped. Without beta_ref each refresh tilts on. With a critic that knows
        E[A | x_t] it is so for rows around the reference, too. None for rewards that are compared each by itself.

        Args:
            reward_std: Standard deviation of the rewards within their groups, pooled; a scalar tensor.
        """
        row = self.config.row()
        held = row.anchors.get("reference", 0.0)
        if (
            self.config.reward_aggregation != "sum"
            or not held
            or (row.base == "reference" and not self.config.critic_learning_rate)
        ):
            return None
        slope = advantage_slope(reward_std, self.config.spread, self.config.group_size)
        return row.gain * slope / held
