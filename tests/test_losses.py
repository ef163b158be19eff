"""Weights and losses, against numbers worked out by hand or by plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.errors import NonFiniteError
from flowrl.functional import advantages, losses

pytestmark = pytest.mark.on_device

GROUPS = torch.tensor([0, 1, 0, 1, 3])  # group 2 is empty
REWARD = torch.tensor([1.0, -2.0, 3.0, 0.5, 7.0])


def weights(tau: float, normalisation: str, reward: torch.Tensor = REWARD) -> torch.Tensor:
    return losses.reward_weights(reward, tau, normalisation, GROUPS, 4)


def test_squared_error_is_a_mean_over_dimensions() -> None:
    a = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    b = torch.tensor([[[3.0, -1.0]], [[0.0, 4.0]]])
    assert losses.squared_error(a, b).tolist() == [(4 + 9) / 2, 16 / 2]


def test_group_mean() -> None:
    assert losses.group_mean(REWARD, GROUPS, 4).tolist() == [2.0, -0.75, 2.0, -0.75, 7.0]


def test_raw_weights() -> None:
    expected = [math.exp(0.5 * r) for r in REWARD.tolist()]
    torch.testing.assert_close(weights(0.5, "none"), torch.tensor(expected))


def test_batch_weights_have_mean_one_and_the_ratios_of_exp() -> None:
    w = weights(0.5, "batch")
    assert w.mean().item() == pytest.approx(1)
    assert (w[2] / w[1]).item() == pytest.approx(math.exp(0.5 * 5.0), rel=1e-5)


def test_group_weights_have_mean_one_in_every_group() -> None:
    w = weights(0.5, "group")
    assert ((w[0] + w[2]) / 2).item() == pytest.approx(1)
    assert ((w[1] + w[3]) / 2).item() == pytest.approx(1)
    assert w[4].item() == pytest.approx(1)
    assert (w[2] / w[0]).item() == pytest.approx(math.exp(0.5 * 2.0), rel=1e-5)


@pytest.mark.parametrize("normalisation", ["batch", "group"])
def test_normalised_weights_do_not_overflow_or_underflow(normalisation: str) -> None:
    """Exponents of thousands, and groups far apart: no weight is lost, none is infinite."""
    for shift in (-1e4, 1e4):
        shifted = weights(1.0, normalisation, REWARD + shift)
        torch.testing.assert_close(shifted, weights(1.0, normalisation), rtol=5e-3, atol=1e-6)
    apart = weights(1.0, "group", REWARD + 1e4 * GROUPS)
    assert apart[1].item() > 0


def test_overflowing_raw_weights_name_tau_and_the_reward() -> None:
    with pytest.raises(NonFiniteError, match=r"tau = 50, largest reward = 7"):
        weights(50.0, "none")


def test_standardise_batch() -> None:
    values = losses.standardise(REWARD, "batch", GROUPS, 4, floor=0.0)
    mean = sum(REWARD.tolist()) / 5
    spread = math.sqrt(sum((r - mean) ** 2 for r in REWARD.tolist()) / 5)
    torch.testing.assert_close(values, torch.tensor([(r - mean) / spread for r in REWARD.tolist()]))


def test_standardise_group_uses_own_means_and_the_pooled_spread() -> None:
    values = losses.standardise(REWARD, "group", GROUPS, 4, floor=0.0)
    centred = torch.tensor([-1.0, -1.25, 1.0, 1.25, 0.0])
    torch.testing.assert_close(values, centred / math.sqrt((1 + 1.5625 + 1 + 1.5625 + 0) / 5))


def test_standardise_none_and_constant_rewards() -> None:
    assert losses.standardise(REWARD, "none", GROUPS, 4) is REWARD
    for kind in ("batch", "group"):
        assert losses.standardise(torch.full((5,), 3.0), kind, GROUPS, 4).tolist() == [0.0] * 5


def test_rewards_that_agree_are_zeros_also_where_their_sum_rounds() -> None:
    """24 x 147.1 is no float32: divided by the small standard deviation, the error would look like an advantage."""
    reward = torch.full((48,), 147.1)
    groups = torch.arange(48) // 24
    assert losses.group_mean(reward, groups, 2).tolist() == reward.tolist()
    assert advantages.group_advantage(reward, torch.arange(len(reward)) // 24).abs().max() == 0
    for kind in ("batch", "group"):
        assert losses.standardise(reward, kind, groups, 2).abs().max() == 0


def test_effective_sample_size() -> None:
    assert losses.effective_sample_size(torch.full((8,), 3.0)).item() == pytest.approx(8)
    assert losses.effective_sample_size(torch.tensor([0.0, 0.0, 5.0])).item() == pytest.approx(1)
    assert losses.effective_sample_size(torch.tensor([1.0, 3.0])).item() == pytest.approx(16 / 10)


# One sample in two dimensions: v - u = (1, 2), v - v_old = (2, 0), v - v_ref = (0, 4).
V = torch.tensor([[1.0, 2.0]])
U, V_OLD, V_REF = torch.tensor([[0.0, 0.0]]), torch.tensor([[-1.0, 2.0]]), torch.tensor([[1.0, -2.0]])


def test_plain_loss_by_hand() -> None:
    w, alpha = torch.tensor([3.0]), torch.tensor([0.5])
    errors = losses.squared_errors(V, U, V_REF)
    assert losses.reward_weighted_loss(errors, w, alpha).item() == pytest.approx(3 * 2.5 + 0.5 * 8)
    assert losses.reward_weighted_loss(errors[:1], w, alpha).item() == pytest.approx(3 * 2.5)


def test_residual_loss_by_hand() -> None:
    w, b, alpha = torch.tensor([3.0]), torch.tensor(1.25), torch.tensor([0.5])
    expected = (3 - 1.25) * 2.5 + 1.25 * 2 + 0.5 * 8
    errors = losses.squared_errors(V, U, V_OLD, V_REF)
    assert losses.residual_weighted_loss(errors, w, b, alpha).item() == pytest.approx(expected)
    without = losses.residual_weighted_loss(errors[:2], w, b, alpha).item()
    assert without == pytest.approx(expected - 0.5 * 8)


def test_plain_minimiser_is_the_weighted_mean_of_targets() -> None:
    """C1: over many (w, u) at one point, v* = (E[w u] + alpha v_ref) / (E[w] + alpha)."""
    u, w, v_ref, alpha = torch.randn(500, 1), torch.rand(500), torch.tensor(0.7), torch.tensor(0.3)
    expected = ((w * u[:, 0]).mean() + alpha * v_ref) / (w.mean() + alpha)

    def loss(v: torch.Tensor) -> torch.Tensor:
        return losses.reward_weighted_loss(losses.squared_errors(v, u, v_ref.expand(500, 1)), w, alpha)

    assert _gradient_at(expected, loss) < 1e-6


def test_residual_baseline_by_hand() -> None:
    w, penalty = torch.tensor([0.5, 1.0, 3.0]), torch.tensor([0.0, 0.2, 0.2])
    assert losses.residual_baseline(w, w.mean(), penalty, "mean").item() == 1.5
    assert losses.residual_baseline(w, w.mean(), penalty, "clipped").tolist() == pytest.approx([0.5, 1.2, 1.5])


def test_residual_minimiser() -> None:
    """(E[w u] + b (v_old - E[u]) + alpha v_ref) / (E[w] + alpha), b the mean weight."""
    u, w, v_ref, v_old, alpha = (
        torch.randn(500, 1),
        torch.rand(500),
        torch.tensor(0.7),
        torch.tensor(-0.4),
        torch.tensor(0.3),
    )
    b = w.mean()
    expected = ((w * u[:, 0]).mean() + b * (v_old - u.mean()) + alpha * v_ref) / (b + alpha)

    def loss(v: torch.Tensor) -> torch.Tensor:
        errors = losses.squared_errors(v, u, v_old.expand(500, 1), v_ref.expand(500, 1))
        return losses.residual_weighted_loss(errors, w, b, alpha)

    assert _gradient_at(expected, loss) < 1e-6


def _gradient_at(value: torch.Tensor, loss) -> float:
    v = value.detach().clone().requires_grad_()
    loss(v.expand(500, 1)).mean().backward()
    return v.grad.abs().item()


def test_constant_reward_moves_the_plain_target_only() -> None:
    v_old, u, one = torch.randn(64, 2), torch.randn(64, 2), torch.ones(64)
    v = v_old.clone().requires_grad_()
    losses.residual_weighted_loss(losses.squared_errors(v, u, v_old, v_old), one, one.mean(), one).sum().backward()
    assert v.grad.abs().max() == 0
    v.grad = None
    losses.reward_weighted_loss(losses.squared_errors(v, u, v_old), one, one).sum().backward()
    assert v.grad.abs().max() > 0.1


def test_kl_time_weight() -> None:
    t = torch.tensor([0.0, 0.5, 0.9, 1.0])
    assert losses.kl_time_weight(t, maximum=8.0).tolist() == pytest.approx([0, 1, 8, 8])
    assert losses.kl_time_weight(torch.tensor([0.75])).item() == pytest.approx(3)


def test_kl_time_weight_integrates_to_the_divergence_of_two_gaussians() -> None:
    """p = N(m, 1), q = N(0, 1): v_p - v_q = m (1 - t) / (t^2 + (1 - t)^2), and KL = m^2 / 2."""
    m, t = 0.8, (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    gap = m * (1 - t) / (t**2 + (1 - t) ** 2)
    assert (losses.kl_time_weight(t) * gap**2).mean().item() == pytest.approx(m**2 / 2, rel=5e-3)
