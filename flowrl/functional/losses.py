"""Weights and losses of flow-matching methods: pure functions of tensors.

Everywhere: `v`, `u`, `v_ref`, `v_old` are (B, ...); `weight` and results are (B,). Squared errors are
means over dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from flowrl.errors import NonFiniteError

Baseline = Literal["clipped", "mean", "local"]
Normalisation = Literal["batch", "group", "none"]
Standardisation = Literal["none", "batch", "group"]


def squared_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compute the squared distance per sample, mean over dimensions: (B, ...) -> (B,)."""
    return (a - b).square().flatten(1).mean(1)


def squared_errors(v: torch.Tensor, *fields: torch.Tensor) -> torch.Tensor:
    """Compute the squared distances of v (B, ...) to each of K fields per sample, means over dimensions: (K, B)."""
    return (v - torch.stack(fields)).square().flatten(2).mean(2)


def weighed(values: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
    """Multiply values by weights, where those are not just the number 1: that costs nothing."""
    return values if isinstance(weight, float) and weight == 1 else weight * values


def means(rows: Mapping[str, torch.Tensor], importance: torch.Tensor | float = 1.0) -> dict[str, torch.Tensor]:
    """Average figures of samples, name -> (B,), with importance weights (B,): name -> scalar, without gradients."""
    every = weighed(torch.stack(tuple(rows.values())).detach(), importance)
    return dict(zip(rows, every.mean(1).unbind()))


def group_mean(values: torch.Tensor, groups: torch.Tensor, n_groups: int) -> torch.Tensor:
    """Average `values` (B,) within each group, given back per sample (B,); `groups` (B,) int64.

    Where all of a group agree it is their value exactly: the rounding of a sum would be taken for a difference, which
    dividing by the standard deviation blows up.
    """
    least = torch.full((n_groups,), torch.inf, dtype=values.dtype, device=values.device)
    least = least.scatter_reduce(0, groups, values, "amin")
    total = torch.zeros_like(least).index_add_(0, groups, values - least[groups])
    count = torch.zeros_like(least).index_add_(0, groups, torch.ones_like(values))
    return (least + total / count.clamp_min(1))[groups]


def standardise(
    reward: torch.Tensor, kind: Standardisation, groups: torch.Tensor, n_groups: int, floor: float = 1e-4
) -> torch.Tensor:
    """Centre rewards and divide them by their standard deviation, in the batch or in each group.

    "group" takes each group's own mean and the standard deviation pooled over all groups: a group in which
    all rewards agree then gives zeros, not noise blown up. "none" gives `reward` back.
    """
    if kind == "none":
        return reward
    if kind == "batch":
        groups, n_groups = torch.zeros_like(groups), 1
    centred = reward - group_mean(reward, groups, n_groups)
    return centred / (centred.square().mean().sqrt() + floor)


def reward_weights(
    reward: torch.Tensor, tau: float, normalisation: Normalisation, groups: torch.Tensor, n_groups: int
) -> torch.Tensor:
    """Compute weights `exp(tau r)` (B,), with mean one in the batch ("batch"), in each group ("group"), or raw.

    The largest exponent is subtracted first, so normalised weights cannot overflow.

    Args:
        reward: (B,), finite.
        groups: (B,) int64, the context of each sample.
        n_groups: Number of contexts.

    Raises:
        NonFiniteError: A weight is not finite; names tau and the largest reward.
    """
    exponent = tau * reward
    if normalisation == "none":
        weight = exponent.exp()
    elif normalisation == "batch":
        weight = (exponent - exponent.max()).exp()
        weight = weight / weight.mean()
    else:
        largest = torch.full((n_groups,), -torch.inf, dtype=exponent.dtype, device=exponent.device)
        largest = largest.scatter_reduce(0, groups, exponent, "amax")
        weight = (exponent - largest[groups]).exp()
        weight = weight / group_mean(weight, groups, n_groups)
    if not bool(weight.isfinite().all()):
        raise NonFiniteError(
            f"exp(tau r) is not finite: tau = {tau:g}, largest reward = {reward.max().item():g}. "
            "Lower tau, or use normalised weights (weight_normalisation 'batch') or standardised rewards."
        )
    return weight


def effective_sample_size(weight: torch.Tensor) -> torch.Tensor:
    """Compute `(sum w)^2 / sum w^2`: how many equally weighted samples the weights are worth; a scalar tensor."""
    return weight.sum().square() / weight.square().sum()


def reward_weighted_loss(errors: torch.Tensor, weight: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Compute the loss of the plain target (arXiv 2502.06061, eq. 12), `w |v - u|^2 + penalty |v - v_ref|^2`: (B,).

    `errors`: `squared_errors` of v to u and v_ref (2, B); to u alone (1, B) there is no penalty. `penalty` (B,) is
    alpha times the time weighting of the regulariser.
    """
    return _weighted_sum(errors, weight, penalty)


def residual_weighted_loss(
    errors: torch.Tensor, weight: torch.Tensor, baseline: torch.Tensor, penalty: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the residual target's loss, `(w - b) |v - u|^2 + b |v - v_old|^2 + penalty |v - v_ref|^2`: (B,).

    Only differences of reward move the model: a constant reward gives a loss whose gradient at v = v_old is exactly
    zero, where the plain target refits the sampler's own errors.

    Args:
        errors: `squared_errors` of v to u, v_old (which drew the samples) and v_ref (3, B); (2, B) without penalty.
        weight: w (B,), not negative.
        baseline: b, a scalar (the mean weight) or (B,): see `residual_baseline`.
        penalty: Its coefficient (B,).
    """
    return _weighted_sum(errors, weight - baseline, baseline, penalty)


def _weighted_sum(errors: torch.Tensor, *coefficients: torch.Tensor | None) -> torch.Tensor:
    """Add up errors (K, B), each times its coefficient: the first K of them, (B,) or scalars."""
    rows = [c if c.dim() else c.expand(errors.shape[1]) for c in coefficients[: len(errors)] if c is not None]
    return (torch.stack(rows) * errors).sum(0)


def residual_baseline(weight: torch.Tensor, mean: torch.Tensor, penalty: torch.Tensor, kind: Baseline) -> torch.Tensor:
    """Compute b of `residual_weighted_loss`: the mean weight ("mean"), or at most `w + penalty` ("clipped"), (B,).

    What `v_old` has too much over the field of its own samples comes through a refresh `E[b | x_t] / (E[w | x_t] +
    penalty)` times as large. With the mean weight this is more than 1 wherever weights are low, and grows without bound
    from refresh to refresh; clipped, it never is. In return samples of low weight repel less than the weights say. With
    a penalty of the mean weight or more there is nothing to clip.
    """
    return mean if kind == "mean" else torch.minimum(weight + penalty, mean)


def kl_time_weight(t: torch.Tensor, maximum: float = 20.0) -> torch.Tensor:
    """Compute `t / (1 - t)` (B,), clipped at `maximum`.

    With it the penalty is the Kullback-Leibler divergence of the samples for exact marginal fields:
    KL(p || q) = integral of t / (1 - t) E|v_p - v_q|^2 (squared norm summed over dimensions) dt.
    """
    return (t / (1 - t)).clamp_max(maximum)


def clipped_objective(ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Compute PPO's pessimistic surrogate as a loss (B,), `max(-A rho, -A clip(rho, 1 - c, 1 + c))` (Schulman 2017)."""
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def clip_fraction(ratio: torch.Tensor, clip_range: float, importance: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Compute the share of ratios outside the clip range, with importance weights of mean one; a scalar tensor."""
    return (importance * ((ratio - 1).abs() > clip_range).float()).mean()
