"""Properties of what several ranks draw, divide and exchange, with threads in the place of processes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import (
    add_paths,
    few,
    read_steps,
    seeded,
    seeds,
    splits,
)

from flowrl.distributed.ranks import Ranks, SharedGenerator
from flowrl.functional import endpoint, flow
from flowrl.training.buffer import RolloutBuffer
from flowrl.types import Batch


class Meeting:
    """Threads that give each other values, as processes do by torch.distributed."""

    def __init__(self, count: int) -> None:
        self.barrier, self.slots = threading.Barrier(count, timeout=20), [None] * count

    def everyones(self, index: int, value: Any) -> list[Any]:
        self.slots[index] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values


class Thread(Ranks):
    """Rank `index` of `count` threads of this process."""

    def __init__(self, index: int, count: int, meeting: Meeting | None = None) -> None:
        super().__init__()
        self.rank, self.world_size, self.meeting = index, count, meeting

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(sum(self.meeting.everyones(self.rank, tensor.clone())))

    def all_to_all(self, rows: torch.Tensor, given: list[int], received: list[int]) -> torch.Tensor:
        parts = [theirs[self.rank] for theirs in self.meeting.everyones(self.rank, rows.split(given))]
        assert [len(part) for part in parts] == received
        return torch.cat(parts)


@few
@given(st.integers(2, 4), st.integers(1, 5), st.integers(1, 3), seeds, st.data())
def test_minibatches_of_several_ranks_are_those_of_one(count, per_rank, batches, seed, data) -> None:
    """Rows of all ranks, one after the other, are the minibatch of a single process, whoever drew its samples."""
    n, batch_size, meeting = count * per_rank, count * batches, Meeting(count)
    sizes = [count * size for size in data.draw(splits(per_rank))]
    parts = torch.arange(n).split(sizes)

    def of(ranks: Ranks) -> list[Batch]:
        found: list[Batch] = []
        for options in ({}, {"parts": 2, "read": read_steps}):
            buffer = RolloutBuffer(n, (1,), "cpu", ranks=ranks, group_size=2, **options)
            buffer.reset()
            for part in parts:
                add_paths(buffer, ranks.shard(part), 3, steps=2)
            buffer.share()
            order = torch.randperm(n * buffer.parts, generator=seeded(seed))
            found += buffer.batches(order, batch_size)
        return found

    with ThreadPoolExecutor(count) as pool:
        each = list(pool.map(lambda i: of(Thread(i, count, meeting)), range(count)))
    for whole, *shares in zip(of(Ranks()), *each):
        for position in range(5):
            assert torch.equal(whole[position], torch.cat([share[position] for share in shares]))
        assert whole.extra.keys() == shares[0].extra.keys()
        for name, ours in whole.extra.items():
            assert torch.equal(ours, torch.cat([share.extra[name] for share in shares])), name


TYPES = torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool
SHAPES = (), (0,), (1,), (2, 3)


@few
@given(st.data(), st.integers(2, 3), st.lists(st.tuples(st.sampled_from(TYPES), st.sampled_from(SHAPES)), min_size=1))
def test_rows_of_all_types_are_exchanged_in_one_message(data, count, kinds) -> None:
    meeting = Meeting(count)
    given = [[data.draw(st.integers(0, 3)) for _ in range(count)] for _ in range(count)]
    rows = [
        {str(i): (100 * torch.randn(sum(given[rank]), *shape)).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
        for rank in range(count)
    ]

    def of(rank: int) -> dict[str, torch.Tensor]:
        return Thread(rank, count, meeting).exchange(rows[rank], given[rank], [numbers[rank] for numbers in given])

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(of, range(count)))
    for name in rows[0]:
        for rank in range(count):
            expected = torch.cat([rows[i][name].split(given[i])[rank] for i in range(count)])
            assert found[rank][name].dtype == expected.dtype
            assert torch.equal(found[rank][name], expected)


@given(st.integers(0, 60), st.integers(1, 6), st.integers(1, 5))
def test_rows_are_divided_among_ranks_in_whole_groups(n, count, group) -> None:
    parts = [Thread(i, count).shard(torch.arange(n), group) for i in range(count)]
    assert torch.equal(torch.cat(parts), torch.arange(n))
    assert all(len(part) % group == 0 for part in parts[:-1])
    assert max(map(len, parts)) - min(map(len, parts)) <= group


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from(["uniform", "logit_normal"]), seeds)
def test_what_ranks_draw_is_what_one_process_draws(n, count, kind, seed) -> None:
    def of(ranks: Ranks) -> list[torch.Tensor]:
        generator = SharedGenerator("cpu", ranks)
        generator.manual_seed(seed)
        rows = n * count if ranks.world_size == 1 else n
        times = flow.sample_time(rows, kind, generator), flow.even_times(rows, kind, generator)
        return [flow.normal(rows, (2, 3), generator), *times, endpoint.stratified_times(rows, 3, kind, generator)]

    parts = [torch.cat(parts) for parts in zip(*(of(Thread(i, count)) for i in range(count)))]
    assert all(torch.equal(part, whole) for part, whole in zip(parts, of(Ranks()), strict=True))
