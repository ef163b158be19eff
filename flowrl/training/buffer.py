"""RolloutBuffer: the samples of an iteration, on the training device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from flowrl.distributed.ranks import Ranks
from flowrl.types import Batch, Rows

Read = Callable[[Rows, torch.Tensor, torch.Tensor], Rows]


class RolloutBuffer:
    """Samples, contexts, rewards, coefficients, groups, and any rows that an algorithm drew with its samples.

    A minibatch consists of *entries*: samples, or with `parts` parts of samples (steps of their paths, say). Entry
    `parts * sample + part` is a part of a sample.

    With several ranks each keeps the samples and rows that it drew. One number per sample (context, reward,
    coefficient, rows of shape (B,)) is known to every rank after `share`. A minibatch is sharded evenly, whichever
    rank drew its samples.

    Args:
        capacity: Number of samples that it holds, over all ranks.
        latent_shape: Shape of one sample in the space of the flow.
        device: Training device.
        group_size: Number of consecutive samples that are drawn together for one context.
        half: Keep samples in float16. Rows keep the type that they were drawn in.
        ranks: The ranks that fill it together; they share `capacity`.
        parts: Number of entries of a sample.
        read: With parts, `read(rows, sample, part)` gives the rows of a minibatch by name, "x_1" among them, from the
            stored rows by name and the indices (B,) of samples and of their parts.
    """

    def __init__(
        self,
        capacity: int,
        latent_shape: tuple[int, ...],
        device: torch.device | str,
        *,
        group_size: int = 1,
        half: bool = False,
        ranks: Ranks | None = None,
        parts: int = 1,
        read: Read | None = None,
    ) -> None:
        self.capacity, self.parts, self.read = capacity, parts, read
        self.ranks = Ranks() if ranks is None else ranks
        self.own_capacity = capacity // self.ranks.world_size
        self.device = torch.device(device)
        dtype = torch.float16 if half else torch.float32
        self.rows: Rows = {"x_1": torch.zeros(self.own_capacity, *latent_shape, device=self.device, dtype=dtype)}
        self.numbers: Rows = {}  # rows of shape (B,), of all ranks
        self.context_ids = torch.zeros(capacity, dtype=torch.long, device=self.device)
        self.reward = torch.zeros(capacity, device=self.device)
        self.coefficient = torch.ones(capacity, device=self.device)
        self.group = torch.arange(capacity, device=self.device) // group_size
        self.place = [0] * capacity  # with several ranks, of each sample: rank * own_capacity + its row on that rank
        self.size = 0

    @property
    def x_1(self) -> torch.Tensor:
        """Storage (own capacity, *latent_shape) of this rank's samples."""
        return self.rows["x_1"]

    @property
    def nbytes(self) -> int:
        """Size of the storage in bytes."""
        return sum(t.nbytes for t in (*self.rows.values(), self.group, self.coefficient, *self._vectors()))

    @property
    def full(self) -> bool:
        """Whether the buffer is full."""
        return self.size >= self.capacity

    def reset(self) -> None:
        """Forget the contents; the storage stays."""
        self.size = 0
        if self.ranks.world_size > 1:  # `share` adds the ranks' vectors up
            for vector in self._vectors():
                vector.zero_()

    def add(
        self,
        x_1: torch.Tensor,
        context_ids: torch.Tensor,
        reward: torch.Tensor,
        extra: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Append a batch; with several ranks, this rank's shard of it.

        Args:
            x_1: (B, *latent_shape).
            context_ids: (B,) int64.
            reward: (B,).
            extra: Rows that belong to each sample, name -> (B, ...); the same names in every call.

        Raises:
            IndexError: The batch does not fit.
        """
        n, ranks = len(x_1), self.ranks
        end = self.size + n * ranks.world_size
        if end > self.capacity:
            raise IndexError(
                f"The buffer holds {self.capacity} samples, {self.size} are in it; {end - self.size} do not fit."
            )
        row, position = self.size // ranks.world_size, self.size + ranks.rank * n
        own, here = slice(row, row + n), slice(position, position + n)
        for name, value in {"x_1": x_1, **(extra or {})}.items():
            if value.dim() == 1:
                self._vector(name, value)[here].copy_(value.detach())  # else storage would belong to its graph
            else:
                self._stored(name, value)[own].copy_(value.detach())
        self.context_ids[here].copy_(context_ids)
        self.reward[here].copy_(reward)
        for rank in range(ranks.world_size if ranks.world_size > 1 else 0):
            first, start = self.size + rank * n, rank * self.own_capacity + row
            self.place[first : first + n] = range(start, start + n)
        self.size = end

    def share(self) -> None:
        """Share rows of one number per sample with every rank, after the last `add`."""
        if self.ranks.world_size > 1:
            for vector in self._vectors():
                self.ranks.all_reduce_(vector)

    def all(self) -> Batch:
        """Give everything in the buffer, in order: views, no copies (but of samples kept in float16).

        With several ranks `x_1`, and rows of more than a number per sample, are of this rank's samples only.
        """
        n, own = self.size, self.size // self.ranks.world_size
        extra = {name: rows[:own] for name, rows in self.rows.items() if name != "x_1"}
        extra |= {name: rows[:n] for name, rows in self.numbers.items()}
        x_1 = self.rows["x_1"][:own].float()
        return Batch(x_1, self.context_ids[:n], self.reward[:n], self.coefficient[:n], self.group[:n], extra)

    def batches(self, order: torch.Tensor, batch_size: int) -> Iterator[Batch]:
        """Go over these entries (N,) in minibatches (the last may be smaller); with several ranks, over this rank's.

        Indices are used on the device: no host synchronisation, or one a pass with several ranks.
        """
        for entries, extra in self._dealt(order, batch_size):
            sample = entries
            if self.read is not None:
                sample, extra["part"] = entries // self.parts, entries % self.parts
            extra |= {name: numbers.index_select(0, sample) for name, numbers in self.numbers.items()}
            stored = (self.context_ids, self.reward, self.coefficient, self.group)
            context_ids, reward, coefficient, group = (vector.index_select(0, sample) for vector in stored)
            yield Batch(extra.pop("x_1").float(), context_ids, reward, coefficient, group, extra)

    def _vectors(self) -> list[torch.Tensor]:
        return [self.context_ids, self.reward, *self.numbers.values()]

    def _vector(self, name: str, like: torch.Tensor) -> torch.Tensor:
        if name not in self.numbers:
            self.numbers[name] = like.new_zeros(self.capacity)
        return self.numbers[name]

    def _stored(self, name: str, like: torch.Tensor) -> torch.Tensor:
        if name not in self.rows or self.rows[name].shape[1:] != like.shape[1:]:
            self.rows[name] = like.new_zeros(self.own_capacity, *like.shape[1:])
        return self.rows[name]

    def _dealt(self, order: torch.Tensor, batch_size: int) -> Iterator[tuple[torch.Tensor, Rows]]:
        """Give this rank's entries of each minibatch of `order`, and their rows."""
        if self.ranks.world_size == 1:
            for entries in order.split(batch_size):
                yield entries, self._read_local(entries)
            return
        host = order.cpu()
        place = torch.tensor(self.place)[host // self.parts]
        owner = place // self.own_capacity
        local = place % self.own_capacity * self.parts + host % self.parts
        for entries, owners, stored in zip(*(part.split(batch_size) for part in (order, owner, local))):
            yield self.ranks.shard(entries), self._exchanged(owners, stored)

    def _read_local(self, entries: torch.Tensor) -> Rows:
        """Read entries of this rank's storage."""
        if self.read is None:
            return {name: rows.index_select(0, entries) for name, rows in self.rows.items()}
        return self.read(self.rows, entries // self.parts, entries % self.parts)

    def _exchanged(self, owners: torch.Tensor, entries: torch.Tensor) -> Rows:
        """Exchange the rows of a minibatch: each rank gets its entries' rows from their owners (all_to_all)."""
        ranks = self.ranks
        here, wanted = owners == ranks.rank, ranks.shard(owners)
        taker = torch.arange(ranks.world_size).repeat_interleave(len(owners) // ranks.world_size)
        given, received = (torch.bincount(r, minlength=ranks.world_size).tolist() for r in (taker[here], wanted))
        place = wanted.argsort(stable=True).argsort().to(self.device)  # rows come ordered by owner
        own = self._read_local(entries[here].to(self.device))
        return {name: rows[place] for name, rows in ranks.exchange(own, given, received).items()}
