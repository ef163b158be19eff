"""The straight path, its one-step estimates, times and couplings."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from flowrl.functional import flow, transport

pytestmark = pytest.mark.on_device


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_interpolate_is_the_straight_path(shape: tuple[int, ...]) -> None:
    x_0, x_1, t = torch.randn(5, *shape), torch.randn(5, *shape), torch.rand(5)
    x_t, u = flow.interpolate(x_0, x_1, t)
    for i in range(5):
        torch.testing.assert_close(x_t[i], (1 - t[i]) * x_0[i] + t[i] * x_1[i], atol=1e-6, rtol=1e-7)
        torch.testing.assert_close(u[i], x_1[i] - x_0[i], atol=1e-6, rtol=1e-7)


def test_interpolate_starts_at_noise_and_ends_at_data() -> None:
    x_0, x_1 = torch.randn(4, 2), torch.randn(4, 2)
    torch.testing.assert_close(flow.interpolate(x_0, x_1, torch.zeros(4))[0], x_0)
    torch.testing.assert_close(flow.interpolate(x_0, x_1, torch.ones(4))[0], x_1)


def test_one_step_estimates_recover_both_ends() -> None:
    x_0, x_1, t = torch.randn(6, 3, 2), torch.randn(6, 3, 2), torch.rand(6)
    x_t, u = flow.interpolate(x_0, x_1, t)
    torch.testing.assert_close(flow.x1_hat(u, x_t, t), x_1)
    torch.testing.assert_close(flow.x0_hat(u, x_t, t), x_0)


def test_score_of_a_gaussian() -> None:
    """x_1 ~ N(m, s^2) makes x_t ~ N(t m, t^2 s^2 + (1 - t)^2), whose score is known."""
    m, s, t = 1.5, 0.4, torch.tensor([0.0, 0.3, 0.8])
    x = torch.randn(3, 1)
    variance = (t * s) ** 2 + (1 - t) ** 2
    gain = (t * s**2 - (1 - t)) / variance  # C5 with one component
    v = m + gain[:, None] * (x - t[:, None] * m)
    expected = -(x - t[:, None] * m) / variance[:, None]
    torch.testing.assert_close(flow.score(v, x, t), expected)


def test_uniform_times(generator: torch.Generator) -> None:
    t = flow.sample_time(20_000, "uniform", generator)
    assert t.shape == (20_000,)
    assert t.dtype == torch.float32
    quantiles = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(np.quantile(t.cpu(), quantiles), quantiles, atol=0.02)


def test_logit_normal_times(generator: torch.Generator) -> None:
    t = flow.sample_time(20_000, "logit_normal", generator).double()
    assert bool(((t > 0) & (t < 1)).all())
    normal = torch.log(t / (1 - t))
    assert normal.mean().abs() < 0.03
    assert (normal.std() - 1).abs() < 0.03


def _cost(x_0: torch.Tensor, x_1: torch.Tensor) -> float:
    return float(((x_0 - x_1) ** 2).sum())


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_even_times_lie_one_in_each_part(kind: str) -> None:
    t = flow.even_times(1000, kind, torch.Generator().manual_seed(0)).double()
    share = t if kind == "uniform" else torch.special.ndtr(t.logit())
    assert (share * 1000).floor().long().tolist() == pytest.approx(list(range(1000)), abs=1)
    assert (share * 1000 % 1).mean() == pytest.approx(0.5, abs=0.05)
    reference = flow.sample_time(100_000, kind, torch.Generator().manual_seed(1))
    assert t.mean() == pytest.approx(reference.mean().item(), abs=0.01)
    assert t.std() == pytest.approx(reference.std().item(), rel=0.02)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 50.0])
def test_ot_permutation_is_optimal_by_brute_force(offset: float, spread: float) -> None:
    x_0, x_1 = torch.randn(6, 2).double(), offset + spread * torch.randn(6, 2).double()
    index = transport.ot_permutation(x_0, x_1, torch.zeros(6, dtype=torch.long))
    assert sorted(index.tolist()) == list(range(6))
    gain = max(float((x_0[list(p)] * (x_1 - offset)).sum()) for p in itertools.permutations(range(6)))
    assert float((x_0[index] * (x_1 - offset)).sum()) == pytest.approx(gain, rel=1e-6)  # the rest of the cost is fixed


def test_ot_permutation_stays_within_contexts() -> None:
    contexts = torch.tensor([7, 1, 2, 7, 1, 2, 7, 1, 0])  # one has a single sample
    x_0, x_1 = torch.randn(9, 3), 50 * torch.randn(9, 3) * (1 + contexts[:, None]) + 100 * contexts[:, None]
    index = transport.ot_permutation(x_0, x_1, contexts)
    assert sorted(index.tolist()) == list(range(9))
    assert contexts[index].tolist() == contexts.tolist()
    for c in contexts.unique():  # and is optimal within each
        mine = (contexts == c).nonzero()[:, 0]
        best = min(_cost(x_0[mine[list(p)]], x_1[mine]) for p in itertools.permutations(range(len(mine))))
        assert _cost(x_0[index[mine]], x_1[mine]) == pytest.approx(best, rel=1e-5)


@pytest.mark.filterwarnings("error")
def test_ot_permutation_of_many_samples_is_optimal() -> None:
    """In one dimension the best coupling is in order."""
    x_0, x_1 = torch.randn(3500, 1), 3 * torch.randn(3500, 1) + 1
    index = transport.ot_permutation(x_0, x_1, torch.zeros(3500, dtype=torch.long))
    assert torch.equal(x_0[index][x_1[:, 0].argsort()], x_0.sort(0).values)


def test_ot_permutation_of_what_is_not_finite_still_permutes() -> None:
    """So that the loss is not finite either, which training counts and leaves out."""
    x_1 = torch.randn(6, 2)
    x_1[2] = torch.nan
    index = transport.ot_permutation(torch.randn(6, 2), x_1, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert sorted(index.tolist()) == list(range(6))
    assert (index[3:] > 2).all()
    same = transport.ot_permutation(torch.randn(3, 2), torch.ones(3, 2), torch.zeros(3))
    assert sorted(same.tolist()) == [0, 1, 2]
