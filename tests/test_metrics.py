"""Diversity, transport distances and intervals, by brute force and known answers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import DEVICE

from flowrl.errors import ConfigError
from flowrl.functional.metrics import diversity, edge_density, entropy, mean_interval, share_interval, wasserstein2

pytestmark = pytest.mark.on_device


def test_diversity_by_brute_force() -> None:
    samples, contexts = torch.randn(20, 3, 2, 2), torch.randint(4, (20,))
    distances = [
        math.dist(samples[i].flatten().tolist(), samples[j].flatten().tolist())
        for i, j in itertools.combinations(range(20), 2)
        if contexts[i] == contexts[j]
    ]
    assert diversity(samples, contexts).item() == pytest.approx(sum(distances) / len(distances), rel=1e-5)


def test_diversity_of_equal_samples_is_zero() -> None:
    samples = torch.rand(1, 3, 16, 16).repeat(64, 1, 1, 1)
    spread = diversity(torch.rand(64, 3, 16, 16), torch.zeros(64)).item()
    assert diversity(samples, torch.zeros(64)).item() < 0.01 * spread


def test_diversity_of_samples_close_together_far_from_the_origin() -> None:
    """Of a flow that ran off, or of pictures that have become nearly alike."""
    contexts = torch.arange(64) % 2
    near = 0.1 * torch.randn(64, 2, generator=torch.Generator(DEVICE).manual_seed(0))
    samples = near + torch.tensor([1000.0, -3000.0])[contexts][:, None]
    assert diversity(samples, contexts).item() == pytest.approx(diversity(near, contexts).item(), rel=0.01)


def test_diversity_without_pairs_is_nan() -> None:
    assert math.isnan(diversity(torch.randn(4, 2), torch.arange(4)).item())
    assert math.isnan(diversity(torch.randn(1, 2), torch.zeros(1)).item())


def test_wasserstein2_of_a_shifted_cloud_is_the_shift() -> None:
    a = torch.randn(40, 3)
    shift = torch.tensor([3.0, -4.0, 12.0])
    assert wasserstein2(a, (a + shift)[torch.randperm(40)]) == pytest.approx(13, rel=1e-5)


def test_wasserstein2_of_a_cloud_with_itself_is_zero() -> None:
    a = torch.randn(40, 2)
    assert wasserstein2(a, a[torch.randperm(40)]) == pytest.approx(0, abs=1e-6)


def test_wasserstein2_in_one_dimension_couples_in_order() -> None:
    a, b = torch.randn(50, 1), 2 * torch.randn(50, 1) + 1
    expected = ((a.sort(0).values - b.sort(0).values) ** 2).mean().sqrt()
    assert wasserstein2(a, b) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_wasserstein2_is_optimal_by_brute_force(offset: float) -> None:
    a, b = torch.randn(6, 3) + offset, 5 * torch.randn(6, 3)
    best = min((a[list(p)] - b).double().square().sum(1).mean().sqrt().item() for p in itertools.permutations(range(6)))
    assert wasserstein2(a, b) == pytest.approx(best, rel=1e-6)


def test_wasserstein2_of_many_points_is_exact() -> None:
    a, b = torch.randn(1500, 1), torch.rand(1500, 1)
    expected = (a.double().sort(0).values - b.double().sort(0).values).square().mean().sqrt()
    assert wasserstein2(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_wasserstein2_refuses_unequal_clouds() -> None:
    with pytest.raises(ConfigError, match=r"\(4, 2\).*\(5, 2\)"):
        wasserstein2(torch.zeros(4, 2), torch.zeros(5, 2))


def test_mean_interval_covers_the_mean_95_times_in_100() -> None:
    inside = 0
    for _ in range(1000):
        low, high = mean_interval(torch.randn(100) + 2)
        inside += low < 2 < high
    assert 925 <= inside <= 970


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("size", [1, 4])
def test_mean_interval_of_few(n: int, size: int) -> None:
    """It covers the mean as often; 1.96 errors of two are 70 %. Of independent values, and of clusters alike."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4000, n, generator=generator).repeat_interleave(size, 1)
    clusters = torch.arange(n).repeat_interleave(size)
    intervals = [mean_interval(row, None if size == 1 else clusters) for row in values]
    assert sum(low <= 0 <= high for low, high in intervals) / 4000 == pytest.approx(0.95, abs=0.012)


def test_mean_interval_of_prompts_that_are_some_of_many() -> None:
    """Eight samples of a prompt are worth little more than one where prompts decide: taken for independent, 54 %."""
    generator, hits = torch.Generator(DEVICE).manual_seed(0), 0
    clusters = torch.arange(64).repeat_interleave(8)[:-4]  # the last prompt has fewer
    for _ in range(200):
        level = torch.randn(1000, generator=generator)
        drawn = level[torch.randperm(1000, generator=generator)[:64]]
        low, high = mean_interval(drawn[clusters] + 0.3 * torch.randn(508, generator=generator), clusters)
        hits += int(low <= level.mean() <= high)
    assert 182 <= hits <= 198
    values = torch.randn(30, generator=generator)
    assert mean_interval(values, torch.arange(30)) == pytest.approx(mean_interval(values), rel=1e-6)
    assert all(map(math.isnan, mean_interval(values, torch.zeros(30, dtype=torch.long))))


@pytest.mark.parametrize(("share", "n"), [(0.5, 8), (0.9, 16), (0.9, 64), (0.98, 64)])
@pytest.mark.parametrize("size", [1, 4])
def test_the_interval_of_a_share_covers_it_also_near_one(share: float, n: int, size: int) -> None:
    """Of 16 values the mean's own interval covers 0.9 in 80 % of the cases, and is (1, 1) in a fifth of them."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(2000, n, generator=generator) < share).float().repeat_interleave(size, 1)
    clusters = torch.arange(n).repeat_interleave(size)
    intervals = [share_interval(row, None if size == 1 else clusters) for row in values]
    assert sum(low <= share <= high for low, high in intervals) / 2000 > 0.93
    assert all(0 <= low < high <= 1 for low, high in intervals)


def test_prompts_that_come_out_alike_are_no_certainty() -> None:
    """Two prompts of many, five of eight samples won of both: the interval was 0.625 to 0.625, one of five so."""
    won, prompts = torch.tensor([1.0] * 5 + [0.0] * 3).repeat(2), torch.arange(2).repeat_interleave(8)
    error = math.sqrt(2 * 16 * 0.625 * 0.375) / 16
    assert mean_interval(won, prompts) == pytest.approx((0.625 - 12.706205 * error, 0.625 + 12.706205 * error))
    low, high = share_interval(won, prompts)
    assert 0 < low < 0.1 < 0.9 < high < 1
    assert share_interval(torch.full((16,), 0.5), prompts) == (0.5, 0.5)


def test_the_interval_of_a_share_by_hand() -> None:
    low, high = share_interval(torch.tensor([1.0] * 300 + [0.0] * 100))
    z = 1.9659272**2 / 399  # Student's t of 399 degrees
    assert (low, high) == pytest.approx(
        [(0.75 + z / 2 + sign * (0.1875 * z + z**2 / 4) ** 0.5) / (1 + z) for sign in (-1, 1)], abs=1e-6
    )
    assert share_interval(torch.ones(21)) == pytest.approx((1 / (1 + 2.0859634**2 / 20), 1), abs=1e-6)
    assert share_interval(torch.zeros(21))[1] == pytest.approx(1 - share_interval(torch.ones(21))[0])
    assert share_interval(torch.full((9,), 0.5)) == (0.5, 0.5)  # nothing but ties
    assert all(map(math.isnan, share_interval(torch.ones(1))))


def test_entropy_of_known_histograms() -> None:
    flat = torch.full((1, 3, 16, 16), 0.3)
    assert entropy(flat).item() == pytest.approx(0, abs=1e-4)
    levels = (torch.arange(256) / 255).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert entropy(levels).item() == pytest.approx(8, abs=1e-3)
    half = flat.clone()
    half[..., :8] = 0.8
    assert entropy(torch.cat([half, flat])).tolist() == pytest.approx([1, 0], abs=1e-4)


def test_edge_density_counts_the_pixels_at_a_step() -> None:
    image = torch.zeros(1, 3, 11, 11)
    assert edge_density(image).item() == 0
    image[..., 5:] = 1.0  # one column of ten sees the step
    assert edge_density(image).item() == pytest.approx(0.1)
    assert edge_density(0.09 * image).item() == 0  # weaker than the threshold
