"""Flow-DPO: direct preference optimisation of a flow (Liu et al. 2025, arXiv 2501.13918).

Online: draw groups of samples of the same context; the best and the worst of a group are a pair, and a group whose
rewards agree has none. Offline: take given pairs. Then raise the likelihood that the winner is preferred, by how much
nearer to it than the reference the flow is, and how much farther from the loser.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from flowrl.config import FlowConfig
from flowrl.functional.flow import sample_time
from flowrl.registry import register_algorithm
from flowrl.training.endpoint_samples import EndpointSamples, EndpointSamplesConfig
from flowrl.training.given import read_samples
from flowrl.training.groups import GroupConfig, GroupRelative
from flowrl.types import Batch, RewardOutput, Rows


@dataclass(frozen=True)
class FlowDPOConfig(GroupConfig, EndpointSamplesConfig):
    """Settings of Flow-DPO."""

    beta: float = 100.0
    """Strength of the preference, for errors that are means over dimensions: the larger, the sooner a pair that is told
    apart stops teaching."""
    data: str = ""
    """File (safetensors) with pairs to learn from offline, without a call of the reward: "winner" and "loser"
    (N, *latent_shape), "contexts" (N,) int64."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.beta > 0, f"beta must be positive, not {self.beta}.")
        self.require(
            not self.data or self.reward_aggregation == "sum",
            "Given pairs have no rewards: reward_aggregation 'gdpo' needs rewards, and data is learnt from without.",
        )
        for name in ("batch_size", *(("n_samples",) if self.data else ())):
            n = getattr(self, name)
            self.require(n % 2 == 0, f"{name} counts both samples of every pair: it must be even, not {n}.")

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason."""
        of_own_samples = ("draw_steps", "max_own_loss", "max_drift")
        return super().idle() | (dict.fromkeys(of_own_samples, "for given pairs") if self.data else {})

    def check_group_size(self) -> None:
        """Check that groups have pairs, where none are given."""
        if not self.data:
            super().check_group_size()

    def candidates(self) -> int:
        """Count the samples that one pair is chosen from: a group's, or the two of a given pair."""
        return 2 if self.data else self.group_size

    def entries_per_epoch(self) -> int:
        """Count two samples for each group, fewer where rewards agree."""
        return 2 * self.n_samples // self.candidates()

    def check_ranks(self, count: int) -> None:
        """Check that ranks get whole pairs of every minibatch."""
        super().check_ranks(count)
        last = self.entries_per_epoch() % self.batch_size
        for name, n in (("batch_size", self.batch_size), ("the last minibatch of an epoch", last)):
            self.require(
                n % (2 * count) == 0,
                f"Each of {count} processes takes whole pairs: {name} = {n} must be a multiple of {2 * count}.",
            )


@register_algorithm("flow_dpo")
class FlowDPO(EndpointSamples, GroupRelative):
    """Direct preference optimisation on the best and the worst of each group, or on given pairs."""

    kind = "endpoint.preference.pairs"
    replayable = True
    draws_ahead = True
    Config: ClassVar[type[FlowConfig]] = FlowDPOConfig
    config: FlowDPOConfig

    def _setup_model(self) -> None:
        super()._setup_model()
        self.n_entries = self.config.n_samples // self.config.candidates()  # pairs of a pass, with what fills it up
        self.data = read_samples(Path(self.config.data), self, ("winner", "loser")) if self.config.data else None
        self.learns_from = "data" if self.config.data else "samples"

    def tilt_of(self, reward_std: torch.Tensor) -> torch.Tensor | None:
        """Give nothing: the tilt of DPO is that of preferences drawn at random by Bradley and Terry's model.

        Here the better sample always wins, which has no finite optimum: how far it goes is decided by beta and time.
        """
        return None

    def contexts(self) -> torch.Tensor:
        """Take the contexts of given pairs, where there are any, for winner and loser in turn; draw others."""
        if self.data is None:
            return super().contexts()
        (winner, _), contexts = self.data
        n = self.config.n_samples // 2
        self.places = torch.arange(2 * n, device=self.device)  # of the samples of this iteration, until they are drawn
        self.chosen = torch.randint(len(winner), (n,), generator=self.generator, device=self.device)
        return contexts[self.chosen].repeat_interleave(2)

    def draw(self, context_ids: torch.Tensor) -> tuple[torch.Tensor, Rows]:
        """Draw latents of the flow, or take given pairs: winners at even places, losers at odd ones."""
        if self.data is None:
            return super().draw(context_ids)
        n = len(context_ids) * self.ranks.world_size
        place, self.places = self.ranks.shard(self.places[:n]), self.places[n:]
        (winner, loser), _ = self.data
        pair = self.chosen[place // 2]
        wins = (place % 2 == 0).view(-1, *[1] * (winner.dim() - 1))
        return torch.where(wins, winner[pair], loser[pair]), {"wins": (place % 2 == 0).float()}

    def reward(self, samples: torch.Tensor, context_ids: torch.Tensor) -> tuple[RewardOutput, torch.Tensor]:
        """Reward samples; of given pairs nothing is asked, and none has a reward (NaN)."""
        if self.data is None:
            return super().reward(samples, context_ids)
        everything = torch.arange(len(samples), device=samples.device)
        return RewardOutput(torch.full((len(samples),), torch.nan, device=samples.device)), everything

    def advantage(self, rollout: Batch) -> torch.Tensor:
        """Mark the samples (B,) of pairs: the winner above 0, the loser below, all others 0.

        Marks have such a size that means over a pass, with what fills it up, are means over pairs.
        """
        if self.data:
            value = rollout.extra["wins"]
        else:  # of one reward the order alone matters
            value = rollout.reward if self.config.reward_aggregation == "sum" else self.relative(rollout)
        table = value.view(-1, self.config.candidates())
        best, worst = table.max(1), table.min(1)
        is_pair = best.values > worst.values
        if "stray" in rollout.extra:  # holds a sample of another context
            is_pair &= ~rollout.extra["stray"].view_as(table).any(1)
        n_pairs, at_once = max(1, int(is_pair.sum())), self.config.batch_size // 2
        self.n_entries = min(-(-n_pairs // at_once) * at_once, len(table))
        size = self.n_entries / n_pairs
        marks = torch.zeros_like(table).scatter(1, best.indices[:, None], size)
        return torch.where(is_pair[:, None], marks.scatter(1, worst.indices[:, None], -size), 0).flatten()

    def order(self) -> torch.Tensor:
        """Shuffle the pairs, winner first, and fill up the last minibatch with groups that have none.

        So ranks share it evenly. What fills up has marks of zero, and teaches nothing.
        """
        size = self.config.candidates()
        marks = self.buffer.coefficient.view(-1, size)
        first = size * torch.arange(len(marks), device=self.device)
        pairs = first[:, None] + torch.stack([marks.argmax(1), marks.argmin(1)], 1)
        shuffled = torch.randperm(len(pairs), generator=self.generator, device=self.device)
        shuffled = shuffled[marks[shuffled].amax(1).argsort(descending=True, stable=True)]  # pairs before others
        return pairs[shuffled][: self.n_entries].flatten()

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute `-log sigmoid(-(beta / 2) (d_w - d_w_ref - d_l + d_l_ref))`, `d = |v - u|^2`, with shared noise."""
        n = len(batch.x_1) // 2
        x_0, t = self.policy.noise(n, self.generator), sample_time(n, self.config.time_sampling, self.generator)
        pair = self.pair(batch, x_0.repeat_interleave(2, dim=0), t.repeat_interleave(2))
        rise = self.error(pair) - self.error(pair, "reference")
        winner, loser = rise[0::2], rise[1::2]
        weight = batch.advantage[0::2].clamp_min(0)  # 0 for what fills up
        loss = -weight * torch.nn.functional.logsigmoid(-self.config.beta / 2 * (winner - loser))
        figures = {"winner_rise": winner, "loser_rise": loser, "accuracy": (winner < loser).float()}
        return loss.mean(), {name: (weight * values).mean() for name, values in figures.items()}
