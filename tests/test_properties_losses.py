"""Properties of weights, advantages, running statistics and losses."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import (
    grouped,
    normal,
    numbers,
    seeded,
    seeds,
    shapes,
    splits,
    tensors,
)

import flowrl
from flowrl.envs.rewards.mixture import RunningStatistics
from flowrl.errors import NonFiniteError
from flowrl.functional import advantages, losses
from flowrl.types import Batch

pytestmark = pytest.mark.on_device


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
    advantage = advantages.group_advantage(reward, torch.arange(len(reward)) // group_size, maximum)
    assert advantage.abs().max() <= maximum
    for values, rewards in zip(advantage.split(group_size), reward.split(group_size)):
        assert (values[rewards.argsort()].diff() >= 0).all()
        if rewards.max() == rewards.min():
            assert values.abs().max() == 0
        elif values.abs().max() < maximum:
            assert abs(values.mean().item()) < 1e-2
        alone = advantages.group_advantage(
            rewards, torch.zeros(len(rewards), dtype=torch.long), maximum
        )  # other groups are nothing to it
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
    groups = torch.arange(len(reward)) // group_size
    assert advantages.group_advantage(reward, groups).abs().max() == 0
    for kind in ("batch", "group"):
        assert losses.standardise(reward, kind, groups, n).abs().max() == 0
    ddpo, batch = statistics_of(n), Batch(reward, groups, reward, reward, groups)
    for _ in range(2):
        assert ddpo.advantage(batch).abs().max() == 0


@given(tensors(-100, 100), st.integers(1, 6), st.data())
def test_the_best_of_each_group_are_chosen(reward, group_size, data) -> None:
    n_best = data.draw(st.integers(1, group_size))
    chosen = advantages.best_of_groups(reward, torch.arange(len(reward)) // group_size, n_best)
    for rewards, kept in zip(reward.split(group_size), chosen.split(group_size)):
        assert kept.sum() == min(n_best, len(rewards))
        if not kept.all():
            assert rewards[kept].min() >= rewards[~kept].max()


@given(st.integers(2, 40), st.integers(1, 4), seeds, numbers(-100, 100), st.data())
def test_running_statistics_are_those_of_all_values_whatever_the_splits(n, n_contexts, seed, offset, data) -> None:
    """Of a mixture's part, and of each context in DDPO."""
    values, sizes = normal(seed, n) + offset, data.draw(splits(n))
    running = RunningStatistics()
    on_host = values.cpu().double()  # where these statistics are
    for part in on_host.split(sizes):
        running.update(part)
    count, mean, squares = running.state.tolist()
    assert count == n
    assert mean == pytest.approx(values.double().mean().item(), rel=1e-9, abs=1e-9)
    assert squares / n == pytest.approx(values.double().var(correction=0).item(), rel=1e-6)
    score = running.standard_score(on_host)
    assert score.square().mean().item() == pytest.approx(1, rel=1e-6)

    ddpo = statistics_of(n_contexts)
    contexts = torch.randint(n_contexts, (n,), generator=seeded(seed))
    for c, r in zip(contexts.split(sizes), values.split(sizes)):
        ddpo.advantage(Batch(r, c, r, r, c))
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
    plain = losses.reward_weighted_loss(losses.squared_errors(v, u, v_ref), w, alpha)
    errors = losses.squared_errors(v, u, v_old, v_ref)
    torch.testing.assert_close(errors, torch.stack([losses.squared_error(v, field) for field in (u, v_old, v_ref)]))
    torch.testing.assert_close(losses.residual_weighted_loss(errors, w, zero, alpha), plain)
    at_old = losses.residual_weighted_loss(errors[:2], w, w, alpha)
    torch.testing.assert_close(at_old, w * losses.squared_error(v, v_old))
    # v_old that fits exactly takes no part: the baseline cancels
    same = losses.residual_weighted_loss(losses.squared_errors(v, u, u, v_ref), w, torch.tensor(mean), alpha)
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=1e-4)
    assert losses.reward_weighted_loss(losses.squared_errors(u, u, u), w, alpha).abs().max() == 0
    clipped = losses.residual_baseline(w, torch.tensor(mean), alpha, "clipped")
    assert (clipped <= mean).all()
    assert (clipped <= w + alpha).all()
    assert ((clipped == mean) | (clipped == w + alpha)).all()


@given(tensors(0.5, 2), st.sampled_from([-3.0, -0.25, 0.5, 4.0]), numbers(0.0625, 0.5))
def test_the_clipped_objective_is_pessimistic(ratio, advantage, clip_range) -> None:
    """Never below the plain one; no gradient where the ratio has gone too far in the direction that is asked for."""
    ratio = ratio.requires_grad_()
    a = torch.full_like(ratio, advantage)
    loss = losses.clipped_objective(ratio, a, clip_range)
    assert (loss >= -a * ratio).all()
    (gradient,) = torch.autograd.grad(loss.sum(), ratio)
    too_far = (ratio > 1 + clip_range) if advantage > 0 else (ratio < 1 - clip_range)
    assert (gradient[too_far] == 0).all()
    inside = (ratio - 1).abs() < clip_range
    assert torch.equal(gradient[inside], -a[inside])
    assert losses.clipped_objective(torch.ones(1), a[:1], clip_range).item() == -advantage
