"""Properties of the rollouts: the buffer, the contexts of an iteration, stand-ins of dropped samples."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from properties import (
    add_paths,
    numbers,
    read_steps,
    seeded,
    seeds,
    shapes,
    splits,
)

from flowrl.envs.base import draw_contexts
from flowrl.training.buffer import RolloutBuffer
from flowrl.training.reward_calls import stand_ins
from flowrl.training.transitions import TransitionAlgorithm

pytestmark = pytest.mark.on_device


def numbered(index: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Samples (B, *shape) that can be told apart, exactly representable in float16."""
    return index.float().view(-1, *([1] * len(shape))).expand(-1, *shape)


@given(st.integers(1, 60), st.integers(1, 70), shapes, st.booleans(), seeds, st.data())
def test_an_epoch_has_every_sample_once_with_what_belongs_to_it(n, batch_size, shape, half, seed, data) -> None:
    buffer, index = RolloutBuffer(n + data.draw(st.integers(0, 3)), shape, DEVICE, half=half), torch.arange(n)
    for part in index.split(data.draw(splits(n))):
        buffer.add(numbered(part, shape), part % 7, 3.0 * part, {"half": part + 0.5, "row": numbered(part, (2, 1))})
    batches = list(buffer.batches(torch.randperm(n, generator=seeded(seed)), batch_size))
    assert [len(batch.x_1) for batch in batches] == [len(part) for part in index.split(batch_size)]
    seen = torch.cat([batch.x_1.flatten(1)[:, 0] for batch in batches])
    assert sorted(seen.tolist()) == index.tolist()
    for batch in batches:
        own = batch.x_1.flatten(1)[:, 0]
        assert batch.x_1.dtype == torch.float32
        assert torch.equal(batch.x_1, numbered(own, shape))
        assert torch.equal(batch.context_ids, own.long() % 7)
        assert torch.equal(batch.reward, 3 * own)
        assert torch.equal(batch.extra["half"], own + 0.5)
        assert torch.equal(batch.extra["row"][:, 1, 0], own)


@given(st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=4), st.integers(1, 20))
def test_a_buffer_holds_what_was_added_since_the_last_reset_and_never_more(rounds, capacity) -> None:
    """Batches that do not fit are refused whole; nothing from before a reset comes out again."""
    buffer, counter = RolloutBuffer(capacity, (2,), DEVICE), 0
    for sizes in rounds:
        buffer.reset()
        expected: list[float] = []
        for n in sizes:
            part = torch.arange(counter, counter + n)
            counter += n
            if len(expected) + n > capacity:
                with pytest.raises(IndexError, match="do not fit"):
                    buffer.add(numbered(part, (2,)), part, part.float())
            else:
                buffer.add(numbered(part, (2,)), part, part.float())
                expected += part.tolist()
            assert buffer.all().x_1[:, 1].tolist() == buffer.all().reward.tolist() == expected
            assert buffer.all().context_ids.tolist() == expected
            assert buffer.full == (len(expected) == capacity)


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 40), st.integers(0, 9), seeds, st.data())
def test_an_epoch_has_every_recorded_step_once(n, steps, batch_size, first, seed, data) -> None:
    buffer = RolloutBuffer(n, (1,), DEVICE, parts=steps, read=read_steps)
    for part in torch.arange(n).split(data.draw(splits(n))):
        add_paths(buffer, part, first)
    seen: list[tuple[int, int]] = []
    for batch in buffer.batches(torch.randperm(n * steps, generator=seeded(seed)), batch_size):
        number, t = batch.x_1[:, 0].long(), TransitionAlgorithm.recorded(None, batch)  # type: ignore[arg-type]
        assert torch.equal(t.x_k[:, 0].long(), 100 * number + t.k - first)
        assert torch.equal(t.x_next, t.x_k + 1)
        assert torch.equal(t.log_prob, -t.x_k[:, 0])
        assert torch.equal(batch.reward, 3.0 * number)
        assert torch.equal(batch.extra["half"], number + 0.5)
        seen += zip(number.tolist(), (t.k - first).tolist())
    assert sorted(seen) == [(i, k) for i in range(n) for k in range(steps)]


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 5), seeds, st.booleans(), st.data())
def test_contexts_come_as_often_as_their_shares_say(n_contexts, n_samples, group_size, seed, weighted, data) -> None:
    shares = None
    if weighted:
        weights = data.draw(st.lists(numbers(0.125, 8), min_size=n_contexts, max_size=n_contexts))
        shares = torch.tensor(weights) / sum(weights)
    drawn = draw_contexts(n_contexts, n_samples, group_size, seeded(seed), shares)
    assert drawn.shape == (n_samples,)
    groups = [part.unique().tolist() for part in drawn.split(group_size)]
    assert all(len(group) == 1 for group in groups)
    counts = Counter(context for (context,) in groups)
    for context in range(n_contexts):
        expected = len(groups) * (1 / n_contexts if shares is None else shares[context].item())
        assert math.floor(expected - 1e-4) <= counts[context] <= math.ceil(expected + 1e-4)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.data())
def test_samples_that_were_kept_stand_for_themselves_and_for_their_context(contexts, data) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, len(contexts) - 1), min_size=1)))
    index = stand_ins(torch.tensor(contexts), torch.tensor(kept)).tolist()
    for i, j in enumerate(index):
        assert j in kept
        assert i == j or i not in kept
        assert contexts[i] == contexts[j] or all(contexts[k] != contexts[i] for k in kept)
