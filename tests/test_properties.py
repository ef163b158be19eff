"""What must hold for any input, looked for by hypothesis: buffer, samplers, couplings, statistics, files, command line.

Examples are derived from the tests' names: every run tries the same ones.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import flowrl
from flowrl.distributed.ranks import Ranks, SharedGenerator
from flowrl.envs.base import draw_contexts
from flowrl.envs.gaussians import GaussianMixture
from flowrl.envs.rewards.groups import WinRateReward
from flowrl.envs.rewards.mixture import Normalisation, PartSpec, RunningStatistics, parse_mixture
from flowrl.errors import CheckpointError, ConfigError, NonFiniteError, UnknownNameError
from flowrl.evaluation.steering import _resampled
from flowrl.functional import flow, losses
from flowrl.functional.likelihood import log_prob
from flowrl.functional.metrics import diversity, entropy, mean_interval, pair_distances, wasserstein2
from flowrl.functional.solvers import SDE, SOLVERS, GaussianStep, guided_velocity, ode_sample, sde_sample, time_grid
from flowrl.registry import ALGORITHMS, ENVIRONMENTS, algorithm_class, environment_spec
from flowrl.run import main
from flowrl.runs.commandline import RunConfig, second_pass
from flowrl.sample import draw, seeded_noise
from flowrl.storage.files import host_copies, read_json, read_tensors, save_tensors, write_json
from flowrl.training.buffer import RolloutBuffer
from flowrl.training.reward_calls import stand_ins
from flowrl.training.transitions import clipped_objective
from flowrl.types import Batch

settings.register_profile("flowrl", derandomize=True, deadline=None, database=None, max_examples=40)
settings.load_profile("flowrl")
few, fewer = settings(max_examples=12), settings(max_examples=25)  # for what takes a model, a file, a program

seeds = st.integers(0, 2**31)
solvers = st.sampled_from(sorted(SOLVERS))
shapes = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)
sdes = st.sampled_from([SDE("flow", 0.7), SDE("flow", 1.4), SDE("constant", 0.7), SDE("cps", 0.6), SDE("cps", 1.0)])


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32)


def tensors(low: float, high: float, min_size: int = 1, max_size: int = 30) -> st.SearchStrategy[torch.Tensor]:
    """Vectors (B,) float32."""
    return st.lists(numbers(low, high), min_size=min_size, max_size=max_size).map(torch.tensor)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


@st.composite
def grouped(draw: Any, low: float = -1e3, high: float = 1e3) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Rewards (B,), the group of each (B,), and how many groups there are; some may be empty."""
    reward = draw(tensors(low, high))
    n_groups = draw(st.integers(1, 5))
    groups = draw(st.lists(st.integers(0, n_groups - 1), min_size=len(reward), max_size=len(reward)))
    return reward, torch.tensor(groups), n_groups


@st.composite
def splits(draw: Any, n: int) -> list[int]:
    """Sizes that add up to `n`."""
    cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=5)) if n > 1 else set())
    return [end - start for start, end in zip([0, *cuts], [*cuts, n])]


@st.composite
def time_grids(draw: Any) -> torch.Tensor:
    """Increasing times from 0 to 1, no two nearer than 0.01."""
    inner = draw(st.sets(st.integers(1, 99), max_size=6))
    return torch.tensor([0.0, *(k / 100 for k in sorted(inner)), 1.0])


# The rollout buffer.


def numbered(index: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Samples (B, *shape) that can be told apart, exactly representable in float16."""
    return index.float().view(-1, *([1] * len(shape))).expand(-1, *shape)


@given(st.integers(1, 60), st.integers(1, 70), shapes, st.booleans(), seeds, st.data())
def test_an_epoch_has_every_sample_once_with_what_belongs_to_it(n, batch_size, shape, half, seed, data) -> None:
    buffer, index = RolloutBuffer(n + data.draw(st.integers(0, 3)), shape, "cpu", half=half), torch.arange(n)
    for part in index.split(data.draw(splits(n))):
        buffer.add(numbered(part, shape), part % 7, 3.0 * part, part + 0.5)
    batches = list(buffer.minibatches(batch_size, seeded(seed)))
    assert [len(batch.x_1) for batch in batches] == [len(part) for part in index.split(batch_size)]
    seen = torch.cat([batch.x_1.flatten(1)[:, 0] for batch in batches])
    assert sorted(seen.tolist()) == index.tolist()
    for batch in batches:
        own = batch.x_1.flatten(1)[:, 0]
        assert batch.x_1.dtype == torch.float32
        assert torch.equal(batch.x_1, numbered(own, shape))
        assert torch.equal(batch.contexts, own.long() % 7)
        assert torch.equal(batch.reward, 3 * own)
        assert torch.equal(batch.weight, own + 0.5)


@given(st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=4), st.integers(1, 20))
def test_a_buffer_holds_what_was_added_since_the_last_reset_and_never_more(rounds, capacity) -> None:
    """Batches that do not fit are refused whole; nothing from before a reset comes out again."""
    buffer, counter = RolloutBuffer(capacity, (2,), "cpu"), 0
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
            assert buffer.all().contexts.tolist() == expected
            assert buffer.full == (len(expected) == capacity)


def add_paths(buffer: RolloutBuffer, part: torch.Tensor, first_step: int) -> None:
    """Samples by number, whose k-th state is 100 number + k and whose k-th log-probability is minus that."""
    states = (100 * part[:, None] + torch.arange(buffer.path_steps + 1)).float()
    buffer.add_path(states[..., None], -states[:, :-1], first_step)
    buffer.add(part[:, None].float(), part % 7, 3.0 * part, part + 0.5)


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 40), st.integers(0, 9), seeds, st.data())
def test_an_epoch_has_every_recorded_step_once(n, steps, batch_size, first, seed, data) -> None:
    buffer = RolloutBuffer(n, (1,), "cpu", path_steps=steps)
    for part in torch.arange(n).split(data.draw(splits(n))):
        add_paths(buffer, part, first)
    seen: list[tuple[int, int]] = []
    for batch in buffer.transition_minibatches(batch_size, seeded(seed)):
        number, t = batch.x_1[:, 0].long(), batch.transitions
        assert torch.equal(t.x_k[:, 0].long(), 100 * number + t.k - first)
        assert torch.equal(t.x_next, t.x_k + 1)
        assert torch.equal(t.log_prob, -t.x_k[:, 0])
        assert torch.equal(batch.reward, 3.0 * number)
        seen += zip(number.tolist(), (t.k - first).tolist())
    assert sorted(seen) == [(i, k) for i in range(n) for k in range(steps)]


@given(st.integers(1, 8), st.data())
def test_rearranged_paths_are_those_of_the_samples_that_stand_in(n, data) -> None:
    buffer = RolloutBuffer(2 * n, (1,), "cpu", path_steps=2)
    add_paths(buffer, torch.arange(n), 0)
    index = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n)))
    states = (100 * torch.arange(n, 2 * n)[:, None] + torch.arange(3)).float()
    buffer.add_path(states[..., None], -states[:, :-1], 0)
    buffer.rearrange_path(index)
    assert torch.equal(buffer.states[n:, :, 0], states[index])
    assert torch.equal(buffer.log_prob[n:], -states[index, :-1])
    assert torch.equal(buffer.states[:n, 0, 0], 100.0 * torch.arange(n))  # the batch before is left alone


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
        self.index, self.count, self.meeting = index, count, meeting

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(sum(self.meeting.everyones(self.index, tensor.clone())))

    def exchange(self, rows: torch.Tensor, given: list[int], received: list[int]) -> torch.Tensor:
        parts = [theirs[self.index] for theirs in self.meeting.everyones(self.index, rows.split(given))]
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
        buffer = RolloutBuffer(n, (1,), "cpu", path_steps=2, ranks=ranks)
        buffer.reset()
        for part in parts:
            add_paths(buffer, ranks.shard(part), 3)
        buffer.share()
        return [
            *buffer.minibatches(batch_size, seeded(seed)),
            *buffer.transition_minibatches(batch_size, seeded(seed)),
        ]

    with ThreadPoolExecutor(count) as pool:
        each = list(pool.map(lambda i: of(Thread(i, count, meeting)), range(count)))
    for whole, *shares in zip(of(Ranks()), *each):
        for position in range(4):
            assert torch.equal(whole[position], torch.cat([share[position] for share in shares]))
        for ours, *theirs in zip(whole.transitions or (), *(share.transitions or () for share in shares)):
            assert torch.equal(ours, torch.cat(theirs))


@given(st.integers(0, 60), st.integers(1, 6), st.integers(1, 5))
def test_rows_are_divided_among_ranks_in_whole_groups(n, count, group) -> None:
    parts = [Thread(i, count).mine(torch.arange(n), group) for i in range(count)]
    assert torch.equal(torch.cat(parts), torch.arange(n))
    assert all(len(part) % group == 0 for part in parts[:-1])
    assert max(map(len, parts)) - min(map(len, parts)) <= group


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from(["uniform", "logit_normal"]), seeds)
def test_what_ranks_draw_is_what_one_process_draws(n, count, kind, seed) -> None:
    def of(ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
        generator = SharedGenerator("cpu", ranks)
        generator.manual_seed(seed)
        rows = n * count if ranks.world_size == 1 else n
        return flow.normal(rows, (2, 3), generator), flow.sample_time(rows, kind, generator)

    noise, times = (torch.cat(parts) for parts in zip(*(of(Thread(i, count)) for i in range(count))))
    assert torch.equal(noise, of(Ranks())[0])
    assert torch.equal(times, of(Ranks())[1])


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


# The straight path, samplers and schedules.


@given(shapes, st.integers(0, 5), seeds)
def test_one_step_estimates_recover_both_ends_of_a_path(shape, n, seed) -> None:
    x_0, x_1 = normal(seed, n, *shape), normal(seed + 1, n, *shape)
    t = torch.rand(n, generator=seeded(seed))
    x_t, u = flow.interpolate(x_0, x_1, t)
    torch.testing.assert_close(flow.x1_hat(u, x_t, t), x_1, atol=1e-5, rtol=0)
    torch.testing.assert_close(flow.x0_hat(u, x_t, t), x_0, atol=1e-5, rtol=0)
    early = 0.9 * t  # the score is minus the expected noise, by its standard deviation 1 - t
    expected = -flow.x0_hat(u, x_t, early) / (1 - flow.expand(early, x_t))
    torch.testing.assert_close(flow.score(u, x_t, early), expected, atol=1e-4, rtol=1e-4)


@given(solvers, shapes, st.integers(0, 4), time_grids(), seeds)
def test_a_constant_velocity_is_integrated_exactly(solver, shape, n, times, seed) -> None:
    x_0, u = normal(seed, n, *shape), normal(seed + 1, n, *shape)
    before = x_0.clone()
    x_1 = ode_sample(lambda x, t: u, x_0, times, solver)
    assert x_1.dtype == torch.float32
    torch.testing.assert_close(x_1, x_0 + u, atol=1e-5, rtol=1e-5)
    assert torch.equal(x_0, before)


ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


@given(solvers, time_grids(), st.lists(numbers(-3, 3), min_size=4, max_size=4))
def test_a_solver_of_order_p_integrates_polynomials_in_t_of_degree_below_p(solver, times, coefficients) -> None:
    powers = list(enumerate(coefficients[: ORDER[solver]]))

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return sum(c * t**k for k, c in powers)[:, None].expand_as(x)

    x_1 = ode_sample(field, torch.zeros(1, 1, dtype=torch.float64), times.double(), solver)
    assert x_1.item() == pytest.approx(sum(c / (k + 1) for k, c in powers), abs=1e-9)


def curved(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A field that treats every sample, and every coordinate, by itself."""
    return torch.sin(3 * x) - x * flow.expand(t, x)


@given(solvers, st.integers(1, 12), time_grids(), seeds, st.data())
def test_a_sample_does_not_depend_on_the_others_of_its_batch(solver, n, times, seed, data) -> None:
    x_0 = normal(seed, n, 3)
    whole = ode_sample(curved, x_0, times, solver)
    parts = [ode_sample(curved, part, times, solver) for part in x_0.split(data.draw(splits(n)))]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=1e-5)
    order = torch.randperm(n, generator=seeded(seed))
    torch.testing.assert_close(ode_sample(curved, x_0[order], times, solver), whole[order], atol=1e-6, rtol=1e-5)


@given(sdes, st.integers(2, 8), st.integers(0, 4), shapes, seeds, st.data())
def test_recorded_steps_are_those_that_were_taken(sde, n_steps, n, shape, seed, data) -> None:
    """Shapes, the ODE outside the window, and log-probabilities that belong to the recorded states."""
    start = data.draw(st.integers(0, n_steps - 2))
    window = range(start, data.draw(st.integers(start + 1, n_steps - 1)))
    x_0, times = normal(seed, n, *shape), time_grid(n_steps)
    x_1, states, log_probs = sde_sample(curved, x_0, times, sde, seeded(seed), window)
    assert states.shape == (n, len(window) + 1, *shape)
    assert log_probs.shape == (n, len(window))
    before = ode_sample(curved, x_0, times[: window.start + 1]) if window.start else x_0
    torch.testing.assert_close(states[:, 0], before)
    torch.testing.assert_close(ode_sample(curved, states[:, -1], times[window.stop :]), x_1)
    for i, k in enumerate(window):
        t, t_next = times[k].expand(n), times[k + 1].expand(n)
        step = sde.step(curved(states[:, i], t), states[:, i], t, t_next)
        torch.testing.assert_close(step.mean_log_prob(states[:, i + 1]), log_probs[:, i])
    again, _, _ = sde_sample(curved, x_0, times, sde, seeded(seed), window)
    assert torch.equal(x_1, again)


@given(shapes, numbers(0.125, 0.75), numbers(0.0625, 0.125), numbers(0.125, 1.5), seeds)
def test_the_published_step_of_flow_grpo(shape, t, h, a, seed) -> None:
    """mu = x (1 - a^2 h / (2t)) + h (1 + a^2/2) v, std = a sqrt(h (1-t)/t)."""
    x, v = normal(seed, 2, *shape), normal(seed + 1, 2, *shape)
    step = SDE("flow", a).step(v, x, torch.full((2,), t), torch.full((2,), t + h))
    expected = x * (1 - a**2 * h / (2 * t)) + h * (1 + a**2 / 2) * v
    torch.testing.assert_close(step.mean, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(step.std, torch.full((2,), a * math.sqrt(h * (1 - t) / t)), atol=1e-4, rtol=1e-4)


@given(sdes, numbers(0, 0.75), numbers(0.0625, 0.25), seeds)
def test_a_step_with_little_noise_is_the_step_of_the_ode(sde, t, h, seed) -> None:
    x, v = normal(seed, 2, 3), normal(seed + 1, 2, 3)
    step = SDE(sde.kind, 1e-4).step(v, x, torch.full((2,), t), torch.full((2,), t + h))
    torch.testing.assert_close(step.mean, x + h * v, atol=1e-4, rtol=1e-4)
    assert step.std.max() < 1e-2


@given(numbers(0, 0.75), numbers(0.0625, 0.25), numbers(0.125, 1), seeds)
def test_coefficient_preserving_noise_adds_up(t, h, a, seed) -> None:
    """Of x = t x_1 + (1 - t) x_0 the next state has t' x_1 and noise of standard deviation 1 - t'."""
    x_0, x_1 = normal(seed, 1, 3), normal(seed + 1, 1, 3)
    step = SDE("cps", a).step(x_1 - x_0, (1 - t) * x_0 + t * x_1, torch.tensor([t]), torch.tensor([t + h]))
    kept = (step.mean - (t + h) * x_1) / x_0
    torch.testing.assert_close(kept**2 + step.std**2, torch.full((1, 3), (1 - t - h) ** 2), atol=1e-2, rtol=1e-2)


@given(shapes, numbers(0.125, 4), seeds)
def test_a_gaussian_step_is_most_probable_at_its_mean(shape, std, seed) -> None:
    mean, other, noise = (normal(seed + i, 3, *shape) for i in range(3))
    step, elsewhere = (GaussianStep(m, torch.full((3,), std)) for m in (mean, other))
    torch.testing.assert_close(step.sample(torch.zeros_like(noise)), mean)
    at_mean, away = step.mean_log_prob(mean), step.mean_log_prob(step.sample(noise))
    torch.testing.assert_close(at_mean - away, noise.square().flatten(1).mean(1) / 2, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(step.kl(elsewhere), elsewhere.kl(step))
    assert step.kl(step).abs().max() == 0
    # the divergence is the expected log-ratio, which at the mean is exactly that
    torch.testing.assert_close(step.kl(elsewhere), at_mean - elsewhere.mean_log_prob(mean), atol=1e-4, rtol=1e-3)


@given(st.integers(1, 30), numbers(0.125, 8))
def test_times_rise_from_0_to_1_and_the_shift_can_be_taken_back(steps, shift) -> None:
    times = time_grid(steps, shift)
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float32
    assert times[[0, -1]].tolist() == [0, 1]
    assert bool((times.diff() > 0).all())
    sigma = 1 - times.double()
    before = sigma / (shift - (shift - 1) * sigma)  # solves sigma = shift s / (1 + (shift - 1) s)
    torch.testing.assert_close(1 - before, torch.linspace(0, 1, steps + 1).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(time_grid(2 * steps, shift)[::2], times)
    # reversed in time, a shift is the shift by its inverse
    torch.testing.assert_close(1 - time_grid(steps, 1 / shift).flip(0), times, atol=1e-5, rtol=0)


@given(shapes, st.integers(1, 6), numbers(-4, 8), seeds)
def test_guidance_is_a_line_through_both_velocities(shape, n, scale, seed) -> None:
    v, v_null = normal(seed, n, *shape), normal(seed + 1, n, *shape)
    t = torch.rand(n, generator=seeded(seed)).clamp_min(0.01)
    torch.testing.assert_close(guided_velocity(v, v_null, 1.0, t), v, atol=1e-5, rtol=1e-5)
    assert torch.equal(guided_velocity(v, v_null, 0.0, t), v_null)
    both = guided_velocity(v, v_null, scale, t) + guided_velocity(v, v_null, 1 - scale, t)
    torch.testing.assert_close(both, v + v_null, atol=1e-4, rtol=1e-4)
    nearest = guided_velocity(v, v_null, 0.0, t, "cfg_zero")
    off = ((v - nearest) * v_null).flatten(1).sum(1)  # what is left of v has nothing of v_null
    torch.testing.assert_close(off, torch.zeros(n), atol=1e-4, rtol=0)
    torch.testing.assert_close(guided_velocity(v, v_null, 1.0, t, "cfg_zero"), v, atol=1e-5, rtol=1e-5)
    assert guided_velocity(v, v_null, scale, torch.zeros(n), "cfg_zero").abs().max() == 0
    for kind in ("cfg", "cfg_zero"):
        rows = zip(*(part.split(1) for part in (v, v_null, t)))
        singly = torch.cat([guided_velocity(a, b, scale, s, kind) for a, b, s in rows])
        torch.testing.assert_close(singly, guided_velocity(v, v_null, scale, t, kind), atol=1e-5, rtol=1e-5)


# Couplings.


@given(st.integers(1, 12), st.integers(1, 3), seeds, st.booleans(), st.data())
def test_optimal_transport_permutes_within_contexts_and_costs_least(n, dim, seed, ties, data) -> None:
    """Never more than the pairing it is given, nor than any other; also where points are equal."""
    x_0, x_1 = normal(seed, n, dim), 10 * normal(seed + 1, n, dim)
    if ties:
        x_0, x_1 = x_0.round(), (x_1 / 10).round()
    contexts = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    index = flow.ot_permutation(x_0, x_1, contexts)
    assert sorted(index.tolist()) == list(range(n))
    assert torch.equal(contexts[index], contexts)

    def cost(order: torch.Tensor) -> float:
        return (x_0[order] - x_1).double().square().sum().item()

    assert cost(index) <= cost(torch.arange(n)) * (1 + 1e-6) + 1e-6
    if n > 1:  # exchange two of the same context
        i = data.draw(st.integers(0, n - 1))
        j = data.draw(st.sampled_from((contexts == contexts[i]).nonzero()[:, 0].tolist()))
        other = index.clone()
        other[[i, j]] = other[[j, i]]
        assert cost(index) <= cost(other) * (1 + 1e-6) + 1e-6


@pytest.fixture(scope="module")
def coupled() -> dict[str, flowrl.ORWCFMW2]:
    return {
        kind: flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", target="plain", coupling=kind, seed=0, device="cpu")
        for kind in ("independent", "ot")
    }


@given(st.integers(1, 16), seeds, st.data())
def test_coupling_never_parts_a_sample_from_what_belongs_to_it(coupled, n, seed, data) -> None:
    number = torch.arange(n)
    weight = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.5, 3.0]), min_size=n, max_size=n)))
    assume(weight.sum() > 0)
    batch = Batch(number[:, None].float().expand(n, 2), number % 3, 2.0 * number, weight)
    coupled["independent"].generator.manual_seed(seed)
    same, noise = coupled["independent"].couple(batch)
    assert same is batch
    assert noise.shape == (n, 2)
    coupled["ot"].generator.manual_seed(seed)
    chosen, paired = coupled["ot"].couple(batch)
    own = chosen.x_1[:, 0].long()
    assert torch.equal(chosen.contexts, own % 3)
    assert torch.equal(chosen.reward, 2.0 * own)
    assert (weight[own] > 0).all()  # drawn in proportion to their weights, which are spent by that
    torch.testing.assert_close(chosen.weight, weight.mean().expand(n))
    assert sorted(map(tuple, paired.tolist())) == sorted(map(tuple, noise.tolist()))


# Weights and statistics.


@given(grouped(), numbers(0, 2), numbers(-64, 64), seeds)
def test_normalised_weights(rewards, tau, shift, seed) -> None:
    """Mean one, in the order of rewards; whatever is added to all rewards, and in whatever order they come."""
    reward, groups, n_groups = rewards

    def weights(values: torch.Tensor, kind: str, groups: torch.Tensor = groups) -> torch.Tensor:
        return losses.reward_weights(values, tau, kind, groups, n_groups)

    everything = torch.arange(len(reward))
    for kind, parts in (("batch", [everything]), ("group", [everything[groups == g] for g in groups.unique()])):
        w = weights(reward, kind)
        for part in parts:
            assert w[part].mean().item() == pytest.approx(1, abs=1e-4)
            order = reward[part].argsort()
            assert (w[part][order].diff() >= 0).all()
        # adding rounds rewards of up to 1000 at 2^-14, by which exponents differ up to 2^-13
        torch.testing.assert_close(weights(reward + shift, kind), w, rtol=1e-2, atol=1e-4)
        shuffled = torch.randperm(len(reward), generator=seeded(seed))
        torch.testing.assert_close(weights(reward[shuffled], kind, groups[shuffled]), w[shuffled], rtol=1e-4, atol=1e-6)
    apart = reward + 128.0 * groups  # what other groups are given is nothing to a group
    torch.testing.assert_close(weights(apart, "group"), weights(reward, "group"), rtol=1e-2, atol=1e-4)


@given(tensors(-(2.0**127), 2.0**127), numbers(-1e4, 1e4), st.sampled_from(["batch", "group", "none"]))
def test_weights_are_finite_or_an_error(reward, tau, kind) -> None:
    groups = torch.arange(len(reward)) % 3
    with contextlib.suppress(NonFiniteError):
        weight = losses.reward_weights(reward, tau, kind, groups, 4)
        assert weight.isfinite().all()
        assert (weight >= 0).all()
        assert kind == "none" or weight.max() >= 1 - 1e-4


@given(tensors(2**-10, 1024), numbers(0.125, 64))
def test_an_effective_sample_size_lies_between_one_and_all(weight, factor) -> None:
    n, size = len(weight), losses.effective_sample_size(weight).item()
    assert 1 - 1e-4 <= size <= n * (1 + 1e-4)
    assert losses.effective_sample_size(factor * weight).item() == pytest.approx(size, rel=1e-3)
    assert losses.effective_sample_size(torch.cat([weight, weight])).item() == pytest.approx(2 * size, rel=1e-3)
    assert losses.effective_sample_size(torch.full((n,), factor)).item() == pytest.approx(n, rel=1e-4)
    assert losses.effective_sample_size(torch.cat([weight[:1], torch.zeros(n)])).item() == pytest.approx(1)


@given(grouped(-100, 100), numbers(0.5, 8), numbers(-100, 100))
def test_standardised_rewards(rewards, factor, shift) -> None:
    """Mean zero and mean square one, whatever the unit and the zero of rewards; zero where rewards agree."""
    reward, groups, n_groups = rewards
    for kind in ("batch", "group"):
        centre = [groups == g for g in groups.unique()] if kind == "group" else [slice(None)]
        values = losses.standardise(reward, kind, groups, n_groups)
        for part in centre:
            assert abs(values[part].mean().item()) < 1e-2
            agree = losses.standardise(reward[part][:1].expand(len(reward)), kind, groups, n_groups)
            assert agree.abs().max() == 0
        assert values.square().mean() <= 1 + 1e-3
        spread = max((reward[part].max() - reward[part].min()).item() for part in centre)
        if spread > 1:
            assert values.square().mean().item() == pytest.approx(1, abs=1e-2)
            other = losses.standardise(factor * reward + shift, kind, groups, n_groups)
            torch.testing.assert_close(other, values, atol=2e-2, rtol=1e-2)


@given(tensors(-200, 200), st.integers(1, 9), numbers(0.5, 5))
def test_group_advantages(reward, group_size, maximum) -> None:
    """Mean zero in each group, bounded, in the order of rewards; exactly zero where a group's rewards agree."""
    advantage = losses.group_advantage(reward, group_size, maximum)
    assert advantage.abs().max() <= maximum
    for values, rewards in zip(advantage.split(group_size), reward.split(group_size)):
        assert (values[rewards.argsort()].diff() >= 0).all()
        if rewards.max() == rewards.min():
            assert values.abs().max() == 0
        elif values.abs().max() < maximum:
            assert abs(values.mean().item()) < 1e-2
        alone = losses.group_advantage(rewards, group_size, maximum)  # other groups are nothing to it
        torch.testing.assert_close(alone, values, atol=1e-3, rtol=1e-3)


def statistics_of(n_contexts: int) -> flowrl.DDPO:
    """DDPO with its running statistics alone."""
    ddpo = object.__new__(flowrl.DDPO)
    ddpo.count, ddpo.mean, ddpo.square = torch.zeros(3, n_contexts).unbind()
    ddpo.config = SimpleNamespace(max_advantage=100.0)
    return ddpo


@given(numbers(-200, 200), st.integers(1, 40), st.integers(1, 3))
def test_rewards_that_agree_have_no_advantage(value, group_size, n) -> None:
    """Exactly none, whatever the rewards: rounding must not become an advantage that all samples share."""
    reward = torch.full((n * group_size,), value)
    assert losses.group_advantage(reward, group_size).abs().max() == 0
    groups = torch.arange(len(reward)) // group_size
    for kind in ("batch", "group"):
        assert losses.standardise(reward, kind, groups, n).abs().max() == 0
    ddpo, batch = statistics_of(n), Batch(reward, groups, reward, reward)
    for _ in range(2):
        ddpo.observe(batch)
        assert ddpo.score(batch).abs().max() == 0


@given(tensors(-100, 100), st.integers(1, 6), st.data())
def test_the_best_of_each_group_are_chosen(reward, group_size, data) -> None:
    n_best = data.draw(st.integers(1, group_size))
    chosen = losses.best_of_groups(reward, group_size, n_best)
    for rewards, kept in zip(reward.split(group_size), chosen.split(group_size)):
        assert kept.sum() == min(n_best, len(rewards))
        if not kept.all():
            assert rewards[kept].min() >= rewards[~kept].max()


@given(st.integers(2, 40), st.integers(1, 4), seeds, numbers(-100, 100), st.data())
def test_running_statistics_are_those_of_all_values_whatever_the_splits(n, n_contexts, seed, offset, data) -> None:
    """Of a mixture's part, and of each context in DDPO."""
    values, sizes = normal(seed, n) + offset, data.draw(splits(n))
    running = RunningStatistics()
    for part in values.double().split(sizes):
        running.update(part)
    count, mean, squares = running.state.tolist()
    assert count == n
    assert mean == pytest.approx(values.double().mean().item(), rel=1e-9, abs=1e-9)
    assert squares / n == pytest.approx(values.double().var(correction=0).item(), rel=1e-6)
    score = running.standard_score(values.double())
    assert score.square().mean().item() == pytest.approx(1, rel=1e-6)

    ddpo = statistics_of(n_contexts)
    contexts = torch.randint(n_contexts, (n,), generator=seeded(seed))
    for c, r in zip(contexts.split(sizes), values.split(sizes)):
        ddpo.observe(Batch(r, c, r, r))
    for context in range(n_contexts):
        seen = values[contexts == context].double()
        assert ddpo.count[context] == len(seen)
        if len(seen):
            assert ddpo.mean[context].item() == pytest.approx(seen.mean().item(), abs=1e-4)
            variance = seen.var(correction=0).item()
            assert (ddpo.square[context] / len(seen)).item() == pytest.approx(variance, rel=1e-2, abs=1e-4)


@given(tensors(0, 0.9375, min_size=2), numbers(0.125, 32))
def test_the_time_weight_of_the_divergence(t, maximum) -> None:
    weight = losses.kl_time_weight(t, maximum)
    assert (weight[t.argsort()].diff() >= 0).all()
    assert weight.max() <= maximum
    free = weight < maximum
    torch.testing.assert_close((weight / (1 + weight))[free], t[free], atol=1e-5, rtol=1e-5)


@given(st.integers(1, 6), shapes, seeds, numbers(0, 3), numbers(0, 4))
def test_losses_at_their_borders(n, shape, seed, penalty, mean) -> None:
    """Without a baseline the residual loss is the plain one; with all of the weight as baseline it asks for v_old."""
    v, u, v_old, v_ref = (normal(seed + i, n, *shape) for i in range(4))
    w = 4 * torch.rand(n, generator=seeded(seed))
    alpha, zero = torch.full((n,), penalty), torch.zeros(n)
    plain = losses.reward_weighted_loss(v, u, w, v_ref, alpha)
    torch.testing.assert_close(losses.residual_weighted_loss(v, u, w, zero, v_old, v_ref, alpha), plain)
    at_old = losses.residual_weighted_loss(v, u, w, w, v_old, None, alpha)
    torch.testing.assert_close(at_old, w * losses.squared_error(v, v_old))
    # v_old that fits exactly takes no part: the baseline cancels
    same = losses.residual_weighted_loss(v, u, w, torch.tensor(mean), u, v_ref, alpha)
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=1e-4)
    assert losses.reward_weighted_loss(u, u, w, u, alpha).abs().max() == 0
    clipped = losses.residual_baseline(w, torch.tensor(mean), alpha, "clipped")
    assert (clipped <= mean).all()
    assert (clipped <= w + alpha).all()
    assert ((clipped == mean) | (clipped == w + alpha)).all()


@given(tensors(0.5, 2), st.sampled_from([-3.0, -0.25, 0.5, 4.0]), numbers(0.0625, 0.5))
def test_the_clipped_objective_is_pessimistic(ratio, advantage, clip_range) -> None:
    """Never below the plain one; no gradient where the ratio has gone too far in the direction that is asked for."""
    ratio = ratio.requires_grad_()
    a = torch.full_like(ratio, advantage)
    loss = clipped_objective(ratio, a, clip_range)
    assert (loss >= -a * ratio).all()
    (gradient,) = torch.autograd.grad(loss.sum(), ratio)
    too_far = (ratio > 1 + clip_range) if advantage > 0 else (ratio < 1 - clip_range)
    assert (gradient[too_far] == 0).all()
    inside = (ratio - 1).abs() < clip_range
    assert torch.equal(gradient[inside], -a[inside])
    assert clipped_objective(torch.ones(1), a[:1], clip_range).item() == -advantage


@given(st.integers(2, 20), shapes, seeds, numbers(0.125, 8))
def test_diversity_is_a_mean_distance(n, shape, seed, factor) -> None:
    samples = normal(seed, n, *shape)
    contexts = torch.randint(3, (n,), generator=seeded(seed))
    total, pairs = pair_distances(samples, contexts)
    parts = [pair_distances(samples[contexts == c], contexts[contexts == c]) for c in contexts.unique()]
    torch.testing.assert_close(torch.stack(parts).sum(0), torch.stack([total, pairs]))
    assert pairs == sum(math.comb(count, 2) for count in Counter(contexts.tolist()).values())
    distance = (samples[0] - samples[1]).norm()
    torch.testing.assert_close(diversity(samples[:2], torch.zeros(2)), distance, atol=1e-5, rtol=1e-4)
    assume(pairs > 0)
    value = diversity(samples, contexts)
    order = torch.randperm(n, generator=seeded(seed))
    torch.testing.assert_close(diversity(samples[order], contexts[order]), value)
    torch.testing.assert_close(diversity(factor * samples + 1, contexts), factor * value, atol=1e-4, rtol=1e-4)
    assert diversity(samples[:1].expand_as(samples), contexts) == 0


@given(st.integers(1, 12), st.integers(1, 3), seeds, numbers(-4, 4))
def test_the_transport_distance_is_a_distance(n, dim, seed, shift) -> None:
    a, b, c = (normal(seed + i, n, dim) for i in range(3))
    distance = wasserstein2(a, b)
    assert wasserstein2(b, a) == pytest.approx(distance, abs=1e-5)
    assert wasserstein2(a, c) <= distance + wasserstein2(b, c) + 1e-5
    assert wasserstein2(a, a[torch.randperm(n, generator=seeded(seed))]) == pytest.approx(0, abs=1e-5)
    assert wasserstein2(a, a + shift) == pytest.approx(abs(shift) * math.sqrt(dim), abs=1e-4)
    assert wasserstein2(3 * a, 3 * b) == pytest.approx(3 * distance, rel=1e-4, abs=1e-4)
    assert (a.mean(0) - b.mean(0)).norm().item() - 1e-5 <= distance
    assert distance <= (a - b).square().sum(1).mean().sqrt().item() + 1e-5


@given(st.integers(1, 8), seeds, numbers(-8, 8))
def test_statistics_of_pictures_and_intervals(size, seed, shift) -> None:
    images = torch.rand(2, 3, size, size, generator=seeded(seed))
    bits = entropy(images)
    assert (bits > -1e-5).all()
    assert (bits <= min(8, 2 * math.log2(size)) + 1e-4).all()
    torch.testing.assert_close(entropy(images.flip(-1).mT), bits)
    values = normal(seed, size + 1)
    low, high = mean_interval(values)
    assert low <= values.mean() <= high
    assert mean_interval(values + shift) == pytest.approx((low + shift, high + shift), abs=1e-4)
    low_4, high_4 = mean_interval(values.repeat(50))
    assert high_4 - low_4 <= (high - low) / math.sqrt(50) * (1 + 1e-4)


@few
@given(st.integers(1, 3), st.integers(1, 2), seeds, numbers(-1, 1), numbers(-1, 1))
def test_tilted_mixtures_differ_by_the_reward(k, dim, seed, tau, more) -> None:
    """log q_tau - log q - tau r is the same everywhere, and tilts add up."""
    factors = normal(seed, k, dim, dim) * 0.5
    base = GaussianMixture(normal(seed + 1, k, dim), factors @ factors.mT + 0.5 * torch.eye(dim))
    a, x = normal(seed + 2, dim), normal(seed + 3, 6, dim)
    tilted = base.tilt(tau, linear=a)
    constant = tilted.log_prob(x) - base.log_prob(x) - tau * (x @ a)
    assert (constant - constant[0]).abs().max() < 1e-3
    torch.testing.assert_close(
        tilted.tilt(more, linear=a).log_prob(x), base.tilt(tau + more, linear=a).log_prob(x), atol=1e-3, rtol=1e-3
    )
    curvature = torch.eye(dim)
    both = base.tilt(0.5, linear=a, quadratic=(curvature, a))
    reward = x @ a - 0.5 * (x - a).square().sum(1)
    constant = both.log_prob(x) - base.log_prob(x) - 0.5 * reward
    assert (constant - constant[0]).abs().max() < 1e-3


@settings(max_examples=6)
@given(st.integers(1, 3), st.integers(1, 3), seeds)
def test_likelihood_under_an_affine_flow(n, dim, seed) -> None:
    """x_1 = e^a x_0 + b: the density of noise at x_0, less the log of the stretching; by both divergences."""
    stretch, shift = 0.5 * normal(seed, dim), normal(seed + 1, dim)
    x_0 = normal(seed + 2, n, dim)

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return stretch * (x - shift * t[:, None]) + shift  # x(t) = e^{a t} x_0 + b t

    x_1 = stretch.exp() * x_0 + shift
    expected = -0.5 * x_0.square().sum(1) - 0.5 * dim * math.log(2 * math.pi) - stretch.sum()
    for divergence in ("exact", "hutchinson"):  # the Jacobian is diagonal: every choice of signs gives its trace
        value = log_prob(field, x_1, divergence=divergence, n_probes=2, generator=seeded(seed))
        torch.testing.assert_close(value, expected, atol=1e-2, rtol=1e-3)


@given(st.integers(1, 4), st.integers(1, 12), numbers(0, 1), seeds)
def test_systematic_resampling(groups, n, threshold, seed) -> None:
    """A particle of weight w goes on n w times, rounded up or down; groups of equal weights are left as they are."""
    log_weight = 2 * normal(seed, groups, n)
    before, weight = log_weight.clone(), log_weight.softmax(1)
    drawn = _resampled(log_weight, threshold, seeded(seed))
    for g in range(groups):
        if losses.effective_sample_size(weight[g]) >= threshold * n * (1 + 1e-4):
            assert drawn[g].tolist() == list(range(n))
            assert torch.equal(log_weight[g], before[g])
        elif losses.effective_sample_size(weight[g]) < threshold * n * (1 - 1e-4):
            times = torch.bincount(drawn[g], minlength=n)
            assert (times >= (n * weight[g] - 1e-3).floor()).all()
            assert (times <= (n * weight[g] + 1e-3).ceil()).all()
            assert log_weight[g].abs().max() == 0


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=5), seeds, st.integers(2, 4))
def test_shares_of_wins_have_mean_one_half(prompts, seed, repeats) -> None:
    asked = prompts * repeats
    values = normal(seed, len(asked)).round()  # with ties
    wins = WinRateReward(lambda images, prompts: values, "r")(torch.zeros(len(asked), 3, 1, 1), asked).reward
    for name in set(asked):
        rows = torch.tensor([text == name for text in asked])
        assert wins[rows].mean().item() == pytest.approx(0.5, abs=1e-5)
        assert (wins[rows][values[rows].argsort()].diff() >= 0).all()


# Policies: copies, and samples by their seeds.


@pytest.fixture(scope="module")
def model() -> flowrl.ORWCFMW2:
    settings = {"n_samples": 8, "batch_size": 4, "rollout_steps": 3, "ema_decay": 0.9}
    return flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, device="cpu", **settings)


@given(numbers(0, 1), seeds)
def test_an_average_lies_between_what_it_was_and_what_is_trained(model, decay, seed) -> None:
    policy, noise = model.policy, seeded(seed)
    for role in ("current", "ema"):
        for p in policy.parameters_of(role).values():
            p.data.copy_(torch.randn(p.shape, generator=noise))
    before = {name: p.clone() for name, p in policy.parameters_of("ema").items()}
    policy.update_copy("ema", decay)
    for name, p in policy.parameters_of("ema").items():
        current = policy.parameters_of("current")[name]
        torch.testing.assert_close(p, decay * before[name] + (1 - decay) * current, atol=1e-5, rtol=1e-5)
    policy.update_copy("ema")
    assert all(torch.equal(p, policy.parameters_of("current")[n]) for n, p in policy.parameters_of("ema").items())


@few
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=8), st.integers(1, 9), solvers)
def test_a_sample_is_that_of_its_seed_whatever_the_batches(model, seeds, batch_size, solver) -> None:
    contexts = [None] * len(seeds)
    drawn = torch.cat(list(draw(model.policy, contexts, seeds, batch_size, role="reference")))
    singly = [next(draw(model.policy, [None], [seed], role="reference")) for seed in seeds]
    torch.testing.assert_close(drawn, torch.cat(singly), atol=1e-5, rtol=1e-5)
    x_0 = seeded_noise(seeds, (2,))
    indices = torch.zeros(len(seeds), dtype=torch.long)
    whole = model.policy.sample_latents(indices, x_0=x_0, solver=solver, role="reference")
    parts = zip(indices.split(batch_size), x_0.split(batch_size))
    split = [model.policy.sample_latents(c, x_0=x, solver=solver, role="reference") for c, x in parts]
    torch.testing.assert_close(torch.cat(split), whole, atol=1e-5, rtol=1e-5)


# Files and checkpoints.

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
DTYPES += (torch.int8, torch.int16, torch.bool)


@st.composite
def any_tensor(draw: Any) -> torch.Tensor:
    """Of any shape and type: empty, 0-d, not contiguous, with NaN and infinities."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(seeds)
    tensor = (50 * torch.rand(shape, generator=seeded(seed))).to(dtype)
    if dtype.is_floating_point and tensor.numel():
        tensor.view(-1)[0] = draw(st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 1.0]))
    return tensor.mT if tensor.dim() > 1 and draw(st.booleans()) else tensor


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    is_same_kind = one.dtype == other.dtype and one.shape == other.shape
    return is_same_kind and torch.equal(one.isnan(), other.isnan()) and torch.equal(_no_nan(one), _no_nan(other))


def _no_nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.nan_to_num(3.0, 4.0, 5.0) if tensor.is_floating_point() else tensor


names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable())


@given(st.dictionaries(names, any_tensor(), max_size=5), st.booleans())
def test_tensors_come_back_as_they_were_written(tensors, shared) -> None:
    if shared and tensors:  # two names for the same storage
        tensors["twice"] = next(iter(tensors.values()))
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(Path(folder) / "a", host_copies(tensors))
        loaded = read_tensors(Path(folder) / "a")
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=8), json_values, max_size=4), json_values)
def test_json_comes_back_as_it_was_written(content, other) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.json"
        write_json(file, content)
        assert read_json(file) == content
        assert file.read_bytes().isascii()  # readable whatever the machine's encoding
        if not isinstance(other, dict):
            write_json(file, other)
            with pytest.raises(CheckpointError, match="no JSON object"):
                read_json(file)


class Keeps(flowrl.ORWCFMW2):
    """Keeps tensors of its own in checkpoints."""

    kept: dict[str, torch.Tensor] = {}  # noqa: RUF012  (set by the test)

    def _setup_model(self) -> None:
        super()._setup_model()
        self.own = {name: torch.zeros_like(tensor) for name, tensor in self.kept.items()}

    def extra_state(self) -> dict[str, torch.Tensor]:
        return self.own


@few
@given(st.dictionaries(names, any_tensor(), max_size=4), seeds, st.integers(0, 2))
def test_a_checkpoint_gives_everything_back(kept, seed, iterations) -> None:
    Keeps.kept = kept
    options = {"n_samples": 8, "batch_size": 4, "rollout_steps": 2, "ema_decay": 0.5, "refresh_every": 2}
    model = Keeps("FlowPolicy", "gaussians-linear", seed=seed % 2**31, device="cpu", **options)
    model.learn(8 * iterations)
    for name, tensor in kept.items():
        model.own[name].copy_(tensor)
    model.policy.evaluations = seed
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        loaded = Keeps.load(folder, device="cpu")
    assert loaded.own.keys() == kept.keys()
    assert all(same(loaded.own[name], tensor) for name, tensor in kept.items())
    assert (loaded.config, loaded.seed, loaded.iteration) == (model.config, model.seed, iterations)
    assert (loaded.num_timesteps, loaded._n_updates) == (8 * iterations, 2 * iterations)
    assert loaded.policy.evaluations == seed
    for role in model.policy.roles:
        ours, theirs = model.policy.parameters_of(role), loaded.policy.parameters_of(role)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    for one, other in ((model.generator, loaded.generator), (model.policy.generator, loaded.policy.generator)):
        assert torch.equal(one.get_state(), other.get_state())


# The command line and config.json.

algorithms = st.sampled_from(sorted(ALGORITHMS))
words = st.text("abcXYZ019._-/ äé", min_size=1, max_size=8)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a setting's type."""
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is tuple:
        return st.lists(words.filter(lambda word: not word.startswith("-")), max_size=3).map(tuple)
    return {
        bool: st.booleans(),
        int: st.integers(-3, 2000),
        float: st.floats(allow_nan=False),
        str: words,
        Path: words.map(Path),
        int | None: st.none() | st.integers(0, 10**9),
        Path | None: st.none(),
    }[kind]


def printed(prefix: str, name: str, value: Any) -> list[str]:
    """A setting as one gives it on the command line."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{prefix}{'' if value else 'no-'}{option}"]
    if isinstance(value, tuple):
        return [f"--{prefix}{option}", *value]
    return [f"--{prefix}{option}={value}"]


@contextlib.contextmanager
def captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """What a program prints to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err


def parsed(algo: str, arguments: Sequence[str]) -> tuple[RunConfig, Any, Any]:
    told = ["--algo", algo, "--env", "gaussians-linear", *arguments]
    return second_pass(told, algorithm_class(algo), environment_spec("gaussians-linear"), None)


@pytest.mark.usefixtures("wide")
@settings(max_examples=60)
@given(algorithms, st.data())
def test_settings_that_are_printed_are_parsed_back(algo, data) -> None:
    """Any few settings of any algorithm: the same config from the command line as from Python, or the same error."""
    cls, spec = algorithm_class(algo), environment_spec("gaussians-linear")
    hints = get_type_hints(cls.Config)
    chosen = data.draw(
        st.lists(st.sampled_from([f.name for f in fields(cls.Config)]), min_size=1, max_size=4, unique=True)
    )
    given = {name: data.draw(values_of(hints[name]), label=name) for name in chosen}
    arguments = [text for name, value in given.items() for text in printed("algo.", name, value)]
    refusal = None
    try:
        expected = cls.configure(None, spec.recommended(spec.config), given)
    except ConfigError as error:
        refusal = str(error)
    if refusal is None:
        _, config, _ = parsed(algo, arguments)
        assert config == expected
        assert type(config) is cls.Config
    else:
        text = complaint(["--algo", algo, "--env", "gaussians-linear", "--dry-run", *arguments])
        assert "".join(refusal.split()) in "".join(text.replace("│", "").split())


RUN_FIELDS = [f.name for f in fields(RunConfig) if f.name not in ("algo", "env", "resume")]


@fewer
@given(st.sets(st.sampled_from(RUN_FIELDS), max_size=5).map(sorted), st.data())
def test_options_of_a_run_and_of_an_environment_are_parsed_back(chosen, data) -> None:
    hints = get_type_hints(RunConfig)
    given = {name: data.draw(values_of(hints[name]), label=name) for name in chosen}
    assume(all(not isinstance(value, int | float) or value > 0 or value is False for value in given.values()))
    tau, flow_name = data.draw(st.floats(allow_nan=False)), data.draw(words)
    arguments = [text for name, value in given.items() if value is not None for text in printed("", name, value)]
    run, _, env = parsed("orw_w2", [*arguments, f"--env.tau={tau}", f"--env.flow={flow_name}"])
    assert run == RunConfig(**{"algo": "orw_w2", "env": "gaussians-linear", **given})
    assert (env.tau, env.flow) == (tau, flow_name)


@settings(max_examples=400)
@given(algorithms, st.data())
def test_settings_of_config_json_make_the_same_config(algo, data) -> None:
    """As a checkpoint is loaded: lists become tuples, everything else is as it was, infinities too.

    Settings without meaning are a ConfigError, never anything else.
    """
    cls = algorithm_class(algo)
    hints = get_type_hints(cls.Config)
    chosen = data.draw(
        st.lists(st.sampled_from([f.name for f in fields(cls.Config)]), min_size=1, max_size=4, unique=True)
    )
    given = {name: data.draw(values_of(hints[name]), label=name) for name in chosen}
    try:
        config = cls.Config(**given)
    except ConfigError:
        return
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", {"settings": asdict(config)})
        stored = read_json(Path(folder) / "config.json")["settings"]
    assert cls.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}) == config


@st.composite
def misspelt(draw: Any, known: Sequence[str]) -> tuple[str, str]:
    """A name, and the same with a letter left out, doubled, changed or exchanged with the next."""
    name = draw(st.sampled_from(known))
    place = draw(st.integers(0, len(name) - 2))
    head, one, other, tail = name[:place], name[place], name[place + 1], name[place + 2 :]
    wrong = draw(st.sampled_from([head + other + tail, head + one + one + other + tail, head + other + one + tail]))
    assume(wrong not in known and wrong)
    return name, wrong


def complaint(arguments: Sequence[str]) -> str:
    """What the program says to arguments that are wrong: exit code 2, and never a traceback."""
    with captured() as (out, err):
        try:
            code = main(list(arguments))
        except SystemExit as stopped:  # tyro ends the program itself
            code = stopped.code
    text = out.getvalue() + err.getvalue()
    assert code == 2
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Messages that are not broken over lines, and a folder that stays empty."""
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "300")
        patch.chdir(folder)
        yield
    assert list(folder.iterdir()) == []


def closest(text: str, known: Collection[str]) -> bool:
    """Whether a message asks "Did you mean 'NAME'?" with a name that there is."""
    _, _, rest = text.partition("Did you mean '")
    return rest.partition("'?")[0] in known


@pytest.mark.usefixtures("wide")
@fewer
@given(data=st.data())
def test_a_misspelt_name_is_an_error_that_names_a_known_one(data) -> None:
    """Of an algorithm, an environment or a setting; in the program, and in Python."""
    _, algo = data.draw(misspelt(sorted(ALGORITHMS)))
    text = complaint(["--algo", algo, "--env", "gaussians-linear", "--dry-run"])
    assert f"Unknown algorithm '{algo}'" in text
    assert closest(text, ALGORITHMS)
    _, env = data.draw(misspelt(sorted(ENVIRONMENTS)))
    text = complaint(["--algo", "orw", "--env", env, "--dry-run"])
    assert f"Unknown environment '{env}'" in text
    assert closest(text, ENVIRONMENTS)
    known = [f.name for f in fields(flowrl.ORWCFMW2.Config)]
    _, setting = data.draw(misspelt(known))
    with pytest.raises(UnknownNameError) as raised:
        flowrl.ORWCFMW2.configure(settings={setting: 1})
    assert closest(str(raised.value), known)


@pytest.mark.usefixtures("wide")
@fewer
@given(data=st.data())
def test_a_misspelt_option_is_an_error_that_names_the_right_one(data) -> None:
    known = [f"algo.{f.name.replace('_', '-')}" for f in fields(flowrl.ORWCFMW2.Config)]
    known += [f"env.{f.name}" for f in fields(environment_spec("gaussians-linear").config)]
    known += [name.replace("_", "-") for name in RUN_FIELDS]
    right, wrong = data.draw(misspelt(known))
    assume(not wrong.startswith("-"))
    text = complaint(["--algo", "orw_w2", "--env", "gaussians-linear", f"--{wrong}", "1", "--dry-run"])
    assert f"--{wrong}" in text
    assert f"--{right}" in text


parts = st.builds(
    PartSpec,
    st.sampled_from(["compress", "clip", "count", "my_rewards:nice", "a.b:c-d"]),
    st.booleans(),
    st.none() | st.decimals(-100, 100, places=3).map(float),
    st.sampled_from(get_args(Normalisation)),
)


@given(st.lists(parts, min_size=1, max_size=4, unique_by=lambda part: part.label))
def test_a_mixture_that_is_written_down_is_read_back(specs) -> None:
    def written(part: PartSpec) -> str:
        name = f"winrate({part.name})" if part.win_rate else part.name
        return name if part.weight is None else f"{name}:{part.weight}:{part.normalisation}"

    expected = [part if part.weight is not None else replace(part, normalisation="fixed") for part in specs]
    assert parse_mixture("+".join(map(written, specs))) == expected
