"""Advantages: rewards compared within groups, and which steps of a policy gradient are to be learnt from."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from flowrl.functional.losses import group_mean


def group_advantage(reward: torch.Tensor, group: torch.Tensor, maximum: float = 5.0) -> torch.Tensor:
    """Compute group-relative advantages (Shao et al. 2024): `(r - mean_g) / (std_g + 1e-4)`, clipped at `maximum`.

    Args:
        reward: (B,).
        group: (B,) int64 in [0, B), the group of each sample.
        maximum: Largest size.

    Returns:
        (B,); zero throughout a group whose rewards agree.
    """
    n_groups = len(reward)
    centred = reward - group_mean(reward, group, n_groups)
    std = group_mean(centred.square(), group, n_groups).sqrt()
    return (centred / (std + 1e-4)).clamp(-maximum, maximum)


def members(group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """List the samples of each group as a table: indices (G, S), and a mask of the valid entries, bool (G, S).

    `group` (B,) int64 in [0, B). S is the size of the largest group; smaller ones are filled up with index 0.
    """
    order = group.argsort(stable=True)
    counts = torch.bincount(group)
    first = counts.cumsum(0) - counts
    row, column = group[order], torch.arange(len(group), device=group.device) - first[group[order]]
    table = group.new_zeros(len(counts), int(counts.max()))
    table[row, column] = order
    is_there = torch.zeros_like(table, dtype=torch.bool)
    is_there[row, column] = True
    kept = counts > 0
    return table[kept], is_there[kept]


def best_of_groups(reward: torch.Tensor, group: torch.Tensor, n_best: int = 1) -> torch.Tensor:
    """Tell whether each sample is among the `n_best` of its group: bool (B,).

    `reward` (B,); `group` (B,) int64 in [0, B). Of equal rewards which is taken is left open.
    """
    table, is_there = members(group)
    best = reward[table].masked_fill(~is_there, -torch.inf).topk(min(n_best, table.shape[1]), dim=1).indices
    chosen = torch.zeros_like(reward, dtype=torch.bool)
    picked = torch.zeros_like(is_there).scatter_(1, best, True) & is_there
    chosen[table[picked]] = True
    return chosen


def best_and_worst(reward: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Find preference pairs: the best and the worst sample of each group, indices (P, 2).

    A group whose rewards agree has no preference and gives no pair. `reward` (B,); `group` (B,) int64 in [0, B).
    """
    table, is_there = members(group)
    values = reward[table]
    best, worst = values.masked_fill(~is_there, -torch.inf).max(1), values.masked_fill(~is_there, torch.inf).min(1)
    pairs = torch.stack([best.indices, worst.indices], dim=1)
    return table.gather(1, pairs)[best.values > worst.values]


def decoupled_advantage(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    group: torch.Tensor,
    maximum: float = 5.0,
    compare: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] = group_advantage,
) -> torch.Tensor:
    """Compute advantages (B,) of several rewards, each compared by itself (GDPO, Liu et al. 2026, arXiv 2601.05242).

    `A = sum_i w_i (r_i - mean_g) / (std_g + 1e-4)`, divided by its standard deviation over the batch so that its scale
    does not grow with the number of rewards, and clipped at `maximum`. A sum of raw rewards would let the one of
    largest spread decide.

    Args:
        rewards: (R, B).
        weights: (R,), of either sign.
        group: (B,) int64 in [0, B), the group of each sample.
        maximum: Largest size.
        compare: Another way to compare one reward: (rewards (B,), group, largest size) -> advantages (B,).
    """
    each = torch.stack([compare(reward, group, math.inf) for reward in rewards])
    total = (weights[:, None] * each).sum(0)
    return (total / (total.square().mean().sqrt() + 1e-4)).clamp(-maximum, maximum)


def trusted(ratio: torch.Tensor, advantage: torch.Tensor, divergence: torch.Tensor, delta: float) -> torch.Tensor:
    """Tell which steps may be learnt from: bool (B,) (DPPO's mask; for flows Flow-DPPO, arXiv 2606.11025).

    Left out are those that are far (`divergence > delta`) and move farther out: `A > 0` and a ratio above 1, or
    `A < 0` and one below 1. Steps that lead back are kept, however far they are.
    """
    outward = ((advantage > 0) & (ratio > 1)) | ((advantage < 0) & (ratio < 1))
    return ~(outward & (divergence > delta))
