"""Priority: passes take samples in proportion to the size of what they carry, and in pairs that are noised alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from flowrl.config import FlowConfig
from flowrl.functional.flow import even_times
from flowrl.training.noising import Coupled, CouplingConfig
from flowrl.types import Batch, Pair


@dataclass(frozen=True)
class PriorityConfig(CouplingConfig):
    """Settings of methods whose passes can take samples by priority."""

    priority: float = 0.0
    """Share of a pass that takes samples in proportion to the size of what they carry (how far the weight is from the
    mean, or the advantage) and not each as often, with importance weights: the same gradient in the mean, with less
    noise, as samples whose groups agree take few passes. 0 takes each once; below 1."""
    paired_noise: bool = False
    """Take the samples of a pass in pairs of one group, a better with a worse, noised alike: with the same noise at the
    same time. The same gradient in the mean, with less noise where the two have much in common: that cancels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.priority < 1, f"priority must be at least 0 and less than 1, not {self.priority}.")
        self.require(
            not self.priority or self.coupling not in ("ot", "c2ot"),
            f"coupling '{self.coupling}' itself draws samples by their size: leave priority at 0 with it.",
        )
        self.require(
            not self.paired_noise or self.coupling == "independent",
            f"coupling '{self.coupling}' itself says which noise a sample gets: leave paired_noise off with it.",
        )
        for name in ("n_samples", "batch_size"):
            n = getattr(self, name)
            self.require(
                not self.paired_noise or n % 2 == 0, f"paired_noise takes two samples at once: {name} = {n} is odd."
            )

    def check_ranks(self, count: int) -> None:
        """Check that ranks get whole pairs of every minibatch."""
        super().check_ranks(count)
        last = self.entries_per_epoch() % self.batch_size
        for name, n in (("batch_size", self.batch_size), ("the last minibatch of an epoch", last)):
            self.require(
                not self.paired_noise or n % (2 * count) == 0,
                f"Each of {count} processes takes whole pairs: {name} = {n} must be a multiple of {2 * count}.",
            )


class Prioritised(Coupled):
    """A `Coupled` algorithm whose passes can take samples by priority (Schaul et al. 2016, for their replay)."""

    Config: ClassVar[type[FlowConfig]] = PriorityConfig
    config: Any

    def sizes(self, coefficient: torch.Tensor) -> torch.Tensor:
        """Compute the size (B,) of what samples carry, from coefficients of this iteration (B,)."""
        return coefficient.abs()

    def order(self) -> torch.Tensor:
        """Take each sample as often as its priority says, rounded up or down at random, in random order."""
        n = self.buffer.size
        taken = super().order()
        if self.config.priority:
            expected = self._relative(self.buffer.coefficient[:n]).cumsum(0)
            offset = torch.rand(1, generator=self.generator, device=self.device)
            places = (torch.arange(n, device=self.device) + offset) * (expected[-1] / n)
            taken = torch.searchsorted(expected, places, right=True).clamp_max(n - 1)[taken]
        if not self.config.paired_noise:
            return taken
        pairs = taken[best_with_worst(self.buffer.coefficient[taken], self.buffer.group[taken])].view(-1, 2)
        return pairs[torch.randperm(len(pairs), generator=self.generator, device=self.device)].flatten()

    def couple(self, batch: Batch) -> tuple[Batch, torch.Tensor]:
        """Pair each sample of a minibatch with noise (B, *latent_shape), two neighbours with the same if asked for."""
        if not self.config.paired_noise:
            return super().couple(batch)
        return batch, self.policy.noise(len(batch.x_1) // 2, self.generator).repeat_interleave(2, 0)

    def pair(self, batch: Batch, x_0: torch.Tensor | None = None, t: torch.Tensor | None = None) -> Pair:
        """Pair samples with noise at fresh times; where two neighbours have the same noise they have the same time.

        Times of these pairs lie in equal parts of the minibatch.
        """
        if self.config.paired_noise and x_0 is not None and t is None:
            t = even_times(len(x_0) // 2, self.config.time_sampling, self.generator).repeat_interleave(2)
        return super().pair(batch, x_0, t)

    def importance(self, batch: Batch) -> torch.Tensor | float:
        """Compute the importance weights (B,) of a minibatch's samples: one over how often a pass takes them."""
        return 1 / self._relative(batch.coefficient) if self.config.priority else 1.0

    def _relative(self, coefficient: torch.Tensor) -> torch.Tensor:
        """Compute how often (B,) a pass takes samples in expectation, from their coefficients (B,)."""
        share, mean = self.config.priority, self.sizes(self.buffer.coefficient[: self.buffer.size]).mean()
        relative = torch.where(mean > 0, self.sizes(coefficient) / mean, 1.0)  # 0 / 0 where nothing carries anything
        return (1 - share) + share * relative


def best_with_worst(coefficient: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Order entries so that two neighbours are a pair of a group: its best with its worst, and so on inwards.

    What is left over in groups of an odd number makes pairs of its own, in front.

    Args:
        coefficient: What each entry carries (B,).
        group: Group of each entry (B,), int64, not negative.

    Returns:
        Indices (B,).
    """
    order = coefficient.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]  # by group, and by coefficient in it
    g = group[order]
    place = torch.arange(len(g), device=g.device)
    below, above = place - torch.searchsorted(g, g), torch.searchsorted(g, g, right=True) - 1 - place
    key = g * len(g) + torch.minimum(below, above)
    return order[key.masked_fill(below == above, -1).argsort(stable=True)]
