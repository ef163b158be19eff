"""Properties of metrics, exact densities, resampling and win rates."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from properties import (
    few,
    normal,
    numbers,
    seeded,
    seeds,
    shapes,
)

from flowrl.envs.gaussians import GaussianMixture
from flowrl.envs.rewards.groups import WinRateReward
from flowrl.evaluation.steering import _resampled
from flowrl.functional import losses
from flowrl.functional.likelihood import log_prob
from flowrl.functional.metrics import diversity, entropy, mean_interval, pair_distances, wasserstein2

pytestmark = pytest.mark.on_device


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
    values = normal(seed, len(asked)).cpu().round()  # with ties
    wins = WinRateReward(lambda images, prompts: values, "r")(torch.zeros(len(asked), 3, 1, 1), asked).reward
    for name in set(asked):
        rows = torch.tensor([text == name for text in asked], device=wins.device)
        assert wins[rows].mean().item() == pytest.approx(0.5, abs=1e-5)
        assert (wins[rows][values[rows].argsort()].diff() >= 0).all()
