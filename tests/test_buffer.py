"""RolloutBuffer: contents, minibatches, size."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

import flowrl
from flowrl.training.buffer import RolloutBuffer

pytestmark = pytest.mark.on_device


def filled() -> RolloutBuffer:
    buffer = RolloutBuffer(10, (2, 3), DEVICE)
    for start, end in ((0, 6), (6, 10)):
        index = torch.arange(start, end)
        buffer.add(index[:, None, None].expand(-1, 2, 3).float(), index % 4, 10.0 * index)
    return buffer


def test_contents_in_order() -> None:
    buffer = filled()
    assert buffer.full
    everything = buffer.all()
    assert everything.x_1.shape == (10, 2, 3)
    assert everything.x_1[:, 1, 2].tolist() == list(range(10))
    assert everything.context_ids.tolist() == [i % 4 for i in range(10)]
    assert everything.reward.tolist() == [10.0 * i for i in range(10)]
    assert everything.weight.tolist() == [1.0] * 10


def test_only_what_is_in_it_comes_out() -> None:
    buffer = RolloutBuffer(10, (1,), DEVICE)
    buffer.add(torch.ones(3, 1), torch.zeros(3), torch.ones(3))
    assert not buffer.full
    assert len(buffer.all().x_1) == 3
    assert sum(len(b.x_1) for b in buffer.batches(torch.randperm(3), 2)) == 3
    buffer.reset()
    assert len(buffer.all().x_1) == 0


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 64])
def test_minibatches_cover_everything_once(batch_size: int, generator: torch.Generator) -> None:
    buffer = filled()
    buffer.coefficient.copy_(torch.arange(10) + 0.5)
    batches = list(buffer.batches(torch.randperm(10, generator=generator), batch_size))
    assert [len(b.x_1) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    seen = torch.cat([b.x_1[:, 0, 0] for b in batches])
    assert sorted(seen.tolist()) == list(range(10))
    assert torch.equal(torch.cat([b.context_ids for b in batches]), seen.long() % 4)  # all of one sample together
    assert torch.equal(torch.cat([b.reward for b in batches]), 10 * seen)
    assert torch.equal(torch.cat([b.weight for b in batches]), seen + 0.5)


def test_minibatches_are_in_random_but_seeded_order() -> None:
    def order(seed: int) -> list[float]:
        shuffled = torch.randperm(10, generator=torch.Generator(DEVICE).manual_seed(seed))
        batches = filled().batches(shuffled, 4)
        return torch.cat([b.reward for b in batches]).tolist()

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_overflow_is_an_error_and_changes_nothing() -> None:
    buffer = RolloutBuffer(4, (1,), DEVICE)
    buffer.add(torch.ones(3, 1), torch.zeros(3), torch.ones(3))
    with pytest.raises(IndexError, match="holds 4 samples, 3 are in it; 2 do not fit"):
        buffer.add(torch.zeros(2, 1), torch.zeros(2), torch.zeros(2))
    assert buffer.all().reward.tolist() == [1, 1, 1]


def test_nbytes() -> None:
    assert RolloutBuffer(100, (8, 16, 16), DEVICE).nbytes == 100 * (8 * 16 * 16 * 4 + 8 + 4 + 4 + 8)


def test_nbytes_does_not_depend_on_sampler_steps() -> None:
    sizes = []
    for steps in (4, 64):
        model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, n_samples=32, rollout_steps=steps)
        model.learn(32)
        assert model.buffer.full
        sizes.append(model.buffer.nbytes)
    assert sizes[0] == sizes[1]


def with_rows(n: int = 12, **options: object) -> RolloutBuffer:
    """Samples i with rows of several shapes and types that all say i."""
    buffer = RolloutBuffer(n, (2,), DEVICE, group_size=3, **options)
    for index in torch.arange(n).split(4):
        rows = {
            "number": 10.0 * index,
            "kind": index % 2 == 0,
            "table": index[:, None, None].expand(-1, 3, 2).float(),
            "double": index[:, None].double() / 3,
        }
        buffer.add(index[:, None].expand(-1, 2).float(), index % 4, index.float(), rows)
    return buffer


@pytest.mark.parametrize("half", [False, True])
def test_rows_stay_with_their_samples(half: bool, generator: torch.Generator) -> None:
    """Rows of any shape keep their type, also where samples are kept in half precision."""
    buffer = with_rows(half=half)
    for batch in (buffer.all(), *buffer.batches(torch.randperm(12, generator=generator), 5)):
        index = batch.reward.long()
        assert torch.equal(batch.x_1[:, 0], index.float())
        assert torch.equal(batch.group, index // 3)
        assert torch.equal(batch.extra["number"], 10.0 * index)
        assert torch.equal(batch.extra["kind"], index % 2 == 0)
        assert torch.equal(batch.extra["table"][:, 2, 1], index.float())
        assert torch.equal(batch.extra["double"][:, 0], index.double() / 3)
        assert batch.extra["double"].dtype == torch.float64


def test_rows_count_as_storage() -> None:
    assert with_rows().nbytes - RolloutBuffer(12, (2,), DEVICE).nbytes == 12 * (4 + 1 + 3 * 2 * 4 + 8)


def test_entries_are_parts_of_samples(generator: torch.Generator) -> None:
    """With parts a minibatch is one of parts; what each gets of its sample's rows is read by the algorithm."""

    def read(rows: dict, sample: torch.Tensor, part: torch.Tensor) -> dict:
        return {"x_1": rows["x_1"][sample], "cell": rows["table"][sample, part, 0]}

    buffer = RolloutBuffer(4, (1,), DEVICE, parts=3, read=read)
    table = torch.arange(12.0).view(4, 3, 1)
    buffer.add(torch.arange(4.0)[:, None], torch.zeros(4), torch.arange(4.0), {"table": table})
    seen = []
    for batch in buffer.batches(torch.randperm(12, generator=generator), 5):
        assert torch.equal(batch.extra["cell"], 3 * batch.reward + batch.extra["part"])
        seen += batch.extra["cell"].tolist()
    assert sorted(seen) == list(range(12))
