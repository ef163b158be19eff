"""Noising: with which noise samples are noised again, and how times are weighed."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from flowrl.config import FlowConfig
from flowrl.functional.exact import has_float64, in_float64
from flowrl.functional.flow import sample_time
from flowrl.functional.losses import squared_error, weighed
from flowrl.functional.transport import Coupling, conditional_permutation, ot_permutation
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.training.endpoint_samples import EndpointSamples, EndpointSamplesConfig
from flowrl.training.optimizers import share_of_step
from flowrl.types import Batch, Condition, Pair, Rows

TIME_BINS = 16
LATE_OF = 8  # rows of a minibatch, of which the last two are for late times
TimeWeighting = Literal["none", "variance"]


@dataclass(frozen=True)
class NoisingConfig(EndpointSamplesConfig):
    """Settings of methods that weigh times."""

    time_weighting: TimeWeighting = "none"
    """"variance" weights times by the inverse of E|u - base|^2 there, a running mean: noise is even, the optimum is
    the same."""
    late_anchor: float = 0.0
    """Beyond max_time hold the field to the reference's: a quarter of each minibatch is taken at these times, for this
    times |v - v_ref|^2 alone. 0 leaves the field there to itself: weights that early times move move it, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.late_anchor >= 0, f"late_anchor must not be negative, not {self.late_anchor}.")
        self.require(
            not self.late_anchor or self.batch_size >= LATE_OF,
            f"late_anchor takes two of {LATE_OF} rows: batch_size = {self.batch_size} must be at least that, or "
            "late_anchor 0.",
        )

    def check_ranks(self, count: int) -> None:
        """Check that ranks take the same rows for late times as one process would."""
        super().check_ranks(count)
        last = self.entries_per_epoch() % self.batch_size
        for name, n in (("batch_size", self.batch_size), ("the last minibatch of an epoch", last)):
            self.require(
                count == 1 or not self.late_anchor or n < LATE_OF or n % (LATE_OF * count) == 0,
                f"Each of {count} processes takes {LATE_OF} rows together for late_anchor: {name} = {n} must be a "
                f"multiple of {LATE_OF * count}, or late_anchor 0.",
            )

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason."""
        return super().idle() | ({} if self.max_time < 1 else {"late_anchor": "without a max_time below 1"})


class Noising(EndpointSamples):
    """An `EndpointSamples` method whose times have weights, and that may hold the field beyond the largest."""

    Config: ClassVar[type[FlowConfig]] = NoisingConfig
    config: NoisingConfig

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.config.time_weighting == "variance":
            self.noise_at = self.keep("noise_at", torch.zeros(2, TIME_BINS))  # sums of |u - base|^2, and counts

    def gradient(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Add the gradient of a minibatch's loss to those of before, late times' anchor with it; loss and figures."""
        if not self.config.late_anchor or self.config.max_time == 1 or len(batch.x_1) < LATE_OF:
            return super().gradient(batch)
        late, early = late_rows(len(batch.x_1), self.device)
        result = self.loss(some_rows(batch, early))
        self.checks.loss(result)
        loss, figures = result
        kept = some_rows(batch, late)
        x_0, t = self.policy.noise(len(late), self.generator), sample_time(len(late), "uniform", self.generator)
        pair = FlowAlgorithm.pair(self, kept, x_0, self.config.max_time + (1 - self.config.max_time) * t)
        strayed = squared_error(self.velocity(pair), self.velocity(pair, "reference"))
        strayed = weighed(strayed, self.importance(kept)).mean()
        share_of_step(self, loss + self.config.late_anchor * strayed, len(batch.x_1)).backward()
        figures = {"loss": loss, "late_drift": strayed, **figures}
        return {key: figure.detach() for key, figure in figures.items()}

    def importance(self, batch: Batch) -> torch.Tensor | float:
        """Compute the importance weights (B,) of a minibatch's samples; just 1.0 where a pass takes each once."""
        return 1.0

    def time_weight(
        self, pair: Pair, base: torch.Tensor, importance: torch.Tensor | float = 1.0
    ) -> torch.Tensor | float:
        """Compute weights (B,) of the times of pairs, in the mean over times one; just 1.0 where none are asked for.

        With "variance" they are the inverse of the noise E|u - base|^2 at t, as seen so far: of all samples alike,
        where those that passes take more often count less (`importance`, (B,)).
        """
        if self.config.time_weighting == "none":
            return 1.0
        t, noise = pair.t, squared_error(pair.u, base.detach())
        bins = (t / self.config.max_time * TIME_BINS).long().clamp_max(TIME_BINS - 1)
        seen = torch.zeros_like(self.noise_at)
        share = torch.where(noise.isfinite(), importance, 0.0)  # the step is left out, and the mean is to stay one
        seen[0].index_add_(0, bins, share * noise.nan_to_num(0.0, 0.0, 0.0))
        seen[1].index_add_(0, bins, share)
        self.noise_at += self.ranks.all_reduce_(seen)
        weight = self.noise_at[1] / self.noise_at[0].clamp_min(1e-12)
        weight = torch.where(self.noise_at[1] > 0, weight, 0)
        return weight[bins] * (self.noise_at[1] > 0).sum() / weight.sum()


def some_rows(batch: Batch, rows: torch.Tensor) -> Batch:
    """Take rows of a minibatch by their indices."""
    extra = {name: value[rows] for name, value in batch.extra.items()}
    x_1, context_ids, reward, coefficient, group = (value[rows] for value in batch[:5])
    return Batch(x_1, context_ids, reward, coefficient, group, extra)


def late_rows(n: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide rows of a minibatch: two of eight for late times, and the others; whole pairs, alike on several ranks."""
    n_early = LATE_OF - 2
    n_late = 2 * (n // LATE_OF) + max(n % LATE_OF - n_early, 0)
    i, j = torch.arange(n_late, device=device), torch.arange(n - n_late, device=device)
    return LATE_OF * (i // 2) + n_early + i % 2, LATE_OF * (j // n_early) + j % n_early


@dataclass(frozen=True)
class CouplingConfig(NoisingConfig):
    """Settings of methods that choose how noise is paired with samples."""

    coupling: Coupling = "independent"
    """How noise is paired with samples: independent; by exact minibatch optimal transport within a context ("ot"), or
    between contexts that are alike, too ("c2ot"); or each sample with the noise that it came from ("rectified")."""
    context_weight: float = 1.0
    """Weight of the squared distance of contexts' embeddings (mean one) in the cost of "c2ot", beside that of noise
    and sample; large keeps within a context, 0 forgets contexts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            0 <= self.context_weight < math.inf, f"context_weight must not be negative, not {self.context_weight}."
        )

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason."""
        return super().idle() | ({} if self.coupling == "c2ot" else {"context_weight": "unless coupling is 'c2ot'"})


class Coupled(Noising):
    """A `Noising` algorithm with a choice of how noise is paired with samples."""

    draws_ahead = True
    Config: ClassVar[type[FlowConfig]] = CouplingConfig
    config: Any

    def _setup_model(self) -> None:
        if self.config.coupling == "rectified" and self.ranks.is_main:
            warnings.warn(
                "coupling 'rectified' keeps each sample with its own noise: the flow is straightened, and the reward "
                "moves it only where paths cross. Take 'independent' to learn from the reward.",
                stacklevel=4,
            )
        super()._setup_model()
        self._embedding: torch.Tensor | None = None

    def draw(self, context_ids: torch.Tensor) -> tuple[torch.Tensor, Rows]:
        """Draw latents of the behaviour policy, and keep the noise that they come from where it is asked for."""
        if self.config.coupling != "rectified":
            return super().draw(context_ids)
        x_0 = self.policy.noise(len(context_ids), self.generator)
        return self.drawn_from(x_0, context_ids, self.behaviour_role), {"x_0": x_0}

    def couple(self, batch: Batch) -> tuple[Batch, torch.Tensor]:
        """Pair each sample of a minibatch with noise (B, *latent_shape).

        Weighting optimally coupled pairs would tilt the noise as well. So transport first draws samples in proportion
        to the size of their weight or advantage (each then carries the mean size, with its sign), and couples those:
        samples of either sign by themselves, so that each has standard normal noise.
        """
        coupling, ranks = self.config.coupling, self.ranks
        if coupling == "rectified":
            return batch, batch.extra["x_0"]
        x_0 = self.policy.noise(len(batch.x_1), self.generator)
        if coupling == "independent":
            return batch, x_0
        n = len(x_0) * ranks.world_size  # coupled over the whole minibatch
        x_0, x_1, ids, reward, coefficient, group = (ranks.all_gather(rows, n) for rows in (x_0, *batch[:5]))
        size = coefficient.abs()
        can_choose = (size.sum() > 0) & (size.sum() < math.inf)  # not among zeros, nor numbers that are not finite
        chance = torch.where(can_choose, size, 1)
        index = torch.multinomial(chance, n, replacement=True, generator=self.generator)
        x_1, ids, sign = x_1[index], ids[index], coefficient[index].sign()
        if coupling == "ot":
            order = ot_permutation(x_0, x_1, 2 * ids + (sign < 0))
        else:
            c = self.embedding()
            c = c[ids.to(c.device)]
            order = conditional_permutation(x_0, x_1, c, self.config.context_weight, (sign < 0) * 1)
        own = ranks.shard
        drawn = Batch(own(x_1), own(ids), own(reward[index]), own(size.mean() * sign), own(group[index]))
        return drawn, own(x_0[order])

    def embedding(self) -> torch.Tensor:
        """Give the embeddings (C, E) of all contexts, whose squared distances are one in the mean."""
        if self._embedding is None:
            n = len(self.env.core.contexts)
            embedding = embedding_of(self.policy.condition(torch.arange(n)), n)
            self._embedding = embedding.to(self.device if has_float64(self.device) else "cpu")
        return self._embedding


def embedding_of(condition: Condition, n: int) -> torch.Tensor:
    """Embed `n` encoded contexts: (n, E), float64, in units in which squared distances are one in the mean.

    Parts of (n, ..., E) are averaged over all but the first and the last dimension; of whole numbers, names of classes,
    any two are as far apart.
    """
    parts = [torch.zeros(n, 0, dtype=torch.double)]
    for part in condition:
        if not part.is_floating_point():
            part = torch.nn.functional.one_hot(part.reshape(n, -1).unique(dim=0, return_inverse=True)[1])
        part = in_float64(part.flatten(1, -2) if part.dim() > 2 else part.reshape(n, -1))
        parts.append(part.mean(1) if part.dim() > 2 else part)
    c = torch.cat([parts[0].to(parts[-1].device), *parts[1:]], dim=1)
    spread = c.var(0, correction=1).sum() if n > 1 else c.new_zeros(())
    return c / (2 * spread).sqrt().clamp_min(torch.finfo(c.dtype).tiny)
