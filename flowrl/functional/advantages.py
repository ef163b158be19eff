"""Advantages of several rewards, and which steps of a policy gradient stay in a trust region: pure functions."""

from __future__ import annotations

import math

import torch

from flowrl.functional.losses import group_advantage


def decoupled_advantage(
    rewards: torch.Tensor, weights: torch.Tensor, group: torch.Tensor, maximum: float = 5.0
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
    """
    each = torch.stack([group_advantage(reward, group, math.inf) for reward in rewards])
    total = (weights[:, None] * each).sum(0)
    return (total / (total.square().mean().sqrt() + 1e-4)).clamp(-maximum, maximum)


def trusted(ratio: torch.Tensor, advantage: torch.Tensor, divergence: torch.Tensor, delta: float) -> torch.Tensor:
    """Tell which steps may be learnt from: bool (B,) (DPPO's mask; for flows Flow-DPPO, arXiv 2606.11025).

    Left out are those that are far (`divergence > delta`) and move farther out: `A > 0` and a ratio above 1, or
    `A < 0` and one below 1. Steps that lead back are kept, however far they are.
    """
    outward = ((advantage > 0) & (ratio > 1)) | ((advantage < 0) & (ratio < 1))
    return ~(outward & (divergence > delta))
