"""RolloutBuffer: what an iteration generated, preallocated on the training device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from flowrl.distributed.ranks import Ranks
from flowrl.types import Batch, Transitions


class RolloutBuffer:
    """Sample, context, reward and weight; and for algorithms that record paths, the sampler's noisy steps.

    Endpoint storage does not grow with the number of sampler steps, path storage does. With several ranks each keeps
    the samples and paths that it drew, and the vectors (contexts, reward, weight, log-probabilities) of all samples;
    a minibatch is dealt out evenly, whoever drew its samples.

    Args:
        capacity: Samples it holds, over all ranks.
        latent_shape: Shape of one sample in the space of the flow.
        device: Training device.
        path_steps: Noisy sampler steps to keep of each sample; 0 keeps endpoints only.
        half: Keep samples in float16; paths stay in float32, their log-probabilities are of those very states.
        ranks: The processes that fill it together; they divide `capacity`.
    """

    def __init__(
        self,
        capacity: int,
        latent_shape: tuple[int, ...],
        device: torch.device | str,
        path_steps: int = 0,
        half: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.capacity = capacity
        self.ranks = Ranks() if ranks is None else ranks
        self.own_capacity = capacity // self.ranks.world_size
        self.device = torch.device(device)
        self.x_1 = torch.zeros(
            self.own_capacity, *latent_shape, device=self.device, dtype=torch.float16 if half else torch.float32
        )
        self.contexts = torch.zeros(capacity, dtype=torch.long, device=self.device)
        self.reward = torch.zeros(capacity, device=self.device)
        self.weight = torch.ones(capacity, device=self.device)
        self.path_steps = path_steps
        if path_steps:
            self.states = torch.zeros(self.own_capacity, path_steps + 1, *latent_shape, device=self.device)
            self.log_prob = torch.zeros(capacity, path_steps, device=self.device)
            self.first_step = torch.zeros((), dtype=torch.long, device=self.device)
        self.place = [0] * capacity  # of each sample, with several ranks: rank * own_capacity + row there
        self.size = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the storage takes."""
        return sum(tensor.nbytes for tensor in vars(self).values() if isinstance(tensor, torch.Tensor))

    @property
    def full(self) -> bool:
        """Whether another sample would not fit."""
        return self.size >= self.capacity

    def reset(self) -> None:
        """Forget the contents; the storage stays."""
        self.size = 0
        if self.ranks.world_size > 1:  # `share` adds the ranks' vectors up
            for vector in self._vectors():
                vector.zero_()

    def add(
        self, x_1: torch.Tensor, contexts: torch.Tensor, reward: torch.Tensor, objective: torch.Tensor | None = None
    ) -> None:
        """Append a scored batch; of a batch that ranks divided, this rank's rows.

        Args:
            x_1: (B, *latent_shape).
            contexts: (B,) int64.
            reward: (B,).
            objective: (B,), what weights will be made of, kept in their place.

        Raises:
            IndexError: The batch does not fit.
        """
        n, ranks = len(x_1), self.ranks
        end = self.size + n * ranks.world_size
        if end > self.capacity:
            raise IndexError(
                f"The buffer holds {self.capacity} samples, {self.size} are in it; {end - self.size} do not fit."
            )
        own = self._own_rows(n)
        self.x_1[own].copy_(x_1)
        here = self._own_positions(n)
        self.contexts[here].copy_(contexts)
        self.reward[here].copy_(reward)
        if objective is not None:
            self.weight[here].copy_(objective)
        for rank in range(ranks.world_size if ranks.world_size > 1 else 0):
            first, row = self.size + rank * n, rank * self.own_capacity + own.start
            self.place[first : first + n] = range(row, row + n)
        self.size = end

    def add_path(self, states: torch.Tensor, log_prob: torch.Tensor, first_step: int) -> None:
        """Append the noisy steps of the batch that `add` appends next.

        Args:
            states: (B, path_steps + 1, *latent_shape).
            log_prob: (B, path_steps), mean over dimensions.
            first_step: Index of the first of them in the sampler; the same for the whole buffer.
        """
        self.states[self._own_rows(len(states))].copy_(states)
        self.log_prob[self._own_positions(len(states))].copy_(log_prob)
        self.first_step.fill_(first_step)

    def rearrange_path(self, index: torch.Tensor) -> None:
        """Of the batch (B,) that `add` appends next, put the path of sample `index[i]` in place of that of i."""
        rows, positions = self._own_rows(len(index)), self._own_positions(len(index))
        self.states[rows] = self.states[rows][index]
        self.log_prob[positions] = self.log_prob[positions][index]

    def share(self) -> None:
        """Make the vectors of all samples known to every rank, after the last `add`."""
        if self.ranks.world_size > 1:
            for vector in self._vectors():
                self.ranks.all_reduce_(vector)

    def all(self) -> Batch:
        """Everything in the buffer, in order; views, no copies (but of samples kept in float16).

        With several ranks `x_1` has this rank's samples only.
        """
        n = self.size
        x_1 = self.x_1[: n // self.ranks.world_size].float()
        return Batch(x_1, self.contexts[:n], self.reward[:n], self.weight[:n])

    def minibatches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One pass in random order, in minibatches of `batch_size` (the last may be smaller).

        Indices are drawn and used on the device: no host synchronisation, or one a pass with several ranks.
        """
        return self.batches(torch.randperm(self.size, generator=generator, device=self.device), batch_size)

    def batches(self, order: torch.Tensor, batch_size: int) -> Iterator[Batch]:
        """The samples of these indices in minibatches, without their paths; of each minibatch this rank's rows."""
        for index, fetch in self._dealt(order, batch_size):
            yield self._batch(fetch(lambda rows: self.x_1[rows]), index)

    def transition_minibatches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One pass over all recorded steps of all samples in random order, in minibatches of `batch_size` steps."""
        n = self.path_steps
        order = torch.randperm(self.size * n, generator=generator, device=self.device)
        for chosen, fetch in self._dealt(order, batch_size, n):
            index, step = chosen // n, chosen % n
            steps = Transitions(
                fetch(lambda rows: self.states[rows // n, rows % n]),
                fetch(lambda rows: self.states[rows // n, rows % n + 1]),
                self.first_step + step,
                self.log_prob[index, step],
            )
            yield self._batch(fetch(lambda rows: self.x_1[rows // n]), index)._replace(transitions=steps)

    def _vectors(self) -> list[torch.Tensor]:
        return [self.contexts, self.reward, self.weight, *([self.log_prob] if self.path_steps else [])]

    def _own_rows(self, n: int) -> slice:
        start = self.size // self.ranks.world_size
        return slice(start, start + n)

    def _own_positions(self, n: int) -> slice:
        start = self.size + self.ranks.rank * n
        return slice(start, start + n)

    def _batch(self, x_1: torch.Tensor, index: torch.Tensor) -> Batch:
        return Batch(x_1.float(), self.contexts[index], self.reward[index], self.weight[index])

    def _dealt(
        self, order: torch.Tensor, batch_size: int, per_sample: int = 1
    ) -> Iterator[tuple[torch.Tensor, Callable[[Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]]]:
        """Of each minibatch of `order` this rank's entries, and a function that gets their rows of the storage.

        An entry is `sample * per_sample + step`; the function is given what reads entries of a rank's own storage.
        """
        parts = order.split(batch_size)
        if self.ranks.world_size == 1:
            for part in parts:
                yield part, partial(_read, part)
            return
        host = order.cpu()
        place = torch.tensor(self.place)[host // per_sample]
        owner = place // self.own_capacity
        entry = place % self.own_capacity * per_sample + host % per_sample
        for part, owners, entries in zip(parts, owner.split(batch_size), entry.split(batch_size)):
            yield self.ranks.shard(part), partial(self._exchanged, owners, entries)

    def _exchanged(
        self, owners: torch.Tensor, entries: torch.Tensor, read: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """This rank's rows of a minibatch whose entries lie with their owners."""
        ranks = self.ranks
        here, wanted = owners == ranks.rank, ranks.shard(owners)
        taker = torch.arange(ranks.world_size).repeat_interleave(len(owners) // ranks.world_size)
        given, received = (torch.bincount(r, minlength=ranks.world_size).tolist() for r in (taker[here], wanted))
        rows = ranks.all_to_all(read(entries[here].to(self.device)), given, received)
        return rows[wanted.argsort(stable=True).argsort().to(self.device)]  # they came ordered by owner


def _read(entries: torch.Tensor, read: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return read(entries)
