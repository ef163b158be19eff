"""Groups: methods that compare samples which were drawn together for one context."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from flowrl.checks import shown
from flowrl.config import FlowConfig
from flowrl.errors import ConfigError
from flowrl.functional.advantages import decoupled_advantage, group_advantage
from flowrl.functional.flow import sample_time
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.training.endpoint_samples import EndpointSamples, EndpointSamplesConfig
from flowrl.types import Batch, Pair, RewardOutput, Rows

RewardAggregation = Literal["sum", "gdpo"]
COMPONENT = "reward/"
"""Before the names of rows that hold the reward's components."""


@dataclass(frozen=True)
class GroupConfig(FlowConfig):
    """Settings of methods that compare samples within groups."""

    group_size: int = 8
    """Samples of the same context per iteration, whose rewards are compared; must divide n_samples."""
    reward_aggregation: RewardAggregation = "sum"
    """How a reward that is a weighted sum of several is compared: as their sum, or each by itself within the group and
    then weighted and added ("gdpo"), so that the one of largest spread does not decide."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_group_size()

    def check_group_size(self) -> None:
        """Check that there is something to compare a sample with.

        Raises:
            ConfigError: There is not.
        """
        self.require(
            self.group_size > 1,
            f"group_size must be at least 2, not {self.group_size}: samples of the same context are compared, and a "
            "group of one has nothing to compare. Take group_size = 8, say (--algo.group-size 8).",
        )


class GroupRelative(FlowAlgorithm):
    """A `FlowAlgorithm` whose advantages are relative to the group, of one reward or of several."""

    Config: ClassVar[type[FlowConfig]] = GroupConfig
    config: GroupConfig

    def _setup_model(self) -> None:
        core = self.env.core
        if self.config.reward_aggregation == "gdpo" and len(core.reward_weights) < 2:
            raise ConfigError(
                f"reward_aggregation 'gdpo' compares each of several rewards by itself; the reward of '{core.name}' "
                "is no weighted sum of several. Give one, such as --env.reward clip:0.7+aesthetic:0.3 (a reward of "
                "your own has a dictionary `weights` by the names of its components), or take 'sum'."
            )
        super()._setup_model()

    def rows_of(self, output: RewardOutput) -> Rows:
        """Keep the components of a reward that are compared each by itself."""
        if self.config.reward_aggregation == "sum":
            return {}
        if missing := [name for name in self.env.core.reward_weights if name not in output.components]:
            raise ConfigError(
                f"reward_aggregation 'gdpo' compares the components that the reward has weights for, and it gave no "
                f"{', '.join(map(shown, missing))}, only {', '.join(map(shown, output.components)) or 'none'}."
            )
        return {COMPONENT + name: output.components[name] for name in self.env.core.reward_weights}

    def compared(self, reward: torch.Tensor, group: torch.Tensor, maximum: float) -> torch.Tensor:
        """Compare one reward (B,) within groups (B,): advantages (B,), clipped at `maximum`."""
        return group_advantage(reward, group, maximum)

    def relative(self, rollout: Batch, maximum: float = math.inf) -> torch.Tensor:
        """Compute advantages (B,) relative to the group, clipped at `maximum`; zero where all of a group agree."""
        if self.config.reward_aggregation == "sum":
            return self.compared(rollout.reward, rollout.group, maximum)
        weights = self.env.core.reward_weights
        rewards = torch.stack([rollout.extra[COMPONENT + name] for name in weights])
        given = rewards.new_tensor(list(weights.values()))
        return decoupled_advantage(rewards, given, rollout.group, maximum, self.compared)


@dataclass(frozen=True)
class WholeGroupsConfig(GroupConfig, EndpointSamplesConfig):
    """Settings of methods whose loss sees whole groups."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.batch_size % self.group_size == 0,
            f"A minibatch holds whole groups: group_size = {self.group_size} must divide batch_size = "
            f"{self.batch_size}. Take a multiple of it, with a smaller accumulation if that is too much at once.",
        )

    def check_ranks(self, count: int) -> None:
        """Check that ranks get whole groups of every minibatch."""
        super().check_ranks(count)
        last = self.entries_per_epoch() % self.batch_size
        for name, n in (("batch_size", self.batch_size), ("the last minibatch of an epoch", last)):
            self.require(
                n % (count * self.group_size) == 0,
                f"Each of {count} processes takes whole groups: {name} = {n} must be a multiple of {count} x "
                f"group_size = {count * self.group_size}.",
            )


class WholeGroups(EndpointSamples, GroupRelative):
    """A group-relative method whose minibatches hold whole groups, which share their noise and time."""

    Config: ClassVar[type[FlowConfig]] = WholeGroupsConfig
    config: WholeGroupsConfig

    def order(self) -> torch.Tensor:
        """Shuffle groups, and keep the samples of each together."""
        size = self.config.group_size
        first = size * torch.randperm(self.buffer.size // size, generator=self.generator, device=self.device)
        return (first[:, None] + torch.arange(size, device=self.device)).flatten()

    def in_groups(self, values: torch.Tensor) -> torch.Tensor:
        """Arrange numbers of a minibatch (B,) by group: (G, group_size)."""
        return values.view(-1, self.config.group_size)

    def group_pair(self, batch: Batch) -> Pair:
        """Pair the samples of a minibatch with the same noise at the same time throughout a group."""
        size = self.config.group_size
        n = len(batch.x_1) // size
        x_0 = self.policy.noise(n, self.generator)
        t = sample_time(n, self.config.time_sampling, self.generator)
        return self.pair(batch, x_0.repeat_interleave(size, dim=0), t.repeat_interleave(size))
