"""Optimal transport between clouds of points of equal weight."""

from __future__ import annotations

from typing import Literal

import torch

from flowrl.functional.exact import in_float64

Coupling = Literal["independent", "ot", "c2ot", "rectified"]


def ot_permutation(x_0: torch.Tensor, x_1: torch.Tensor, context_ids: torch.Tensor) -> torch.Tensor:
    """Find indices (B,) that reorder the noise so that `x_0[index]` is optimally coupled with `x_1`.

    Exact minibatch optimal transport (Tong et al. 2023), which for equal weights is an assignment, for each context
    by itself, on the host: one copy to the CPU a call. The noise moves, never the samples, so each sample keeps its
    own weight and context; and it moves only among samples of the same context, so that it stays standard normal given
    the context.

    Args:
        x_0: Noise (B, ...).
        x_1: Samples (B, ...).
        context_ids: (B,) int64.
    """
    same = in_float64(context_ids[:, None] == context_ids[None, :])
    cost = torch.cdist(_standardised(x_1, same), _standardised(x_0, same)).square()
    return _assigned(cost, context_ids).to(x_0.device)


def conditional_permutation(
    x_0: torch.Tensor, x_1: torch.Tensor, embedding: torch.Tensor, weight: float, apart: torch.Tensor
) -> torch.Tensor:
    """Find indices (B,) that reorder the noise so that it is coupled with `x_1` by conditional optimal transport.

    C2OT (Cheng and Schwing 2025, arXiv 2503.10636): noise i is that of context i at first, and giving it to sample j
    costs `|x_0_i - x_1_j|^2 + weight |c_i - c_j|^2`, the first a mean over dimensions. With a large weight noise moves
    among samples of equal embeddings only, as by `ot_permutation`; with weight 0 contexts do not count.

    Args:
        x_0: Noise (B, ...).
        x_1: Samples (B, ...).
        embedding: Contexts c (B, E).
        weight: Of their distance.
        apart: (B,) int64; noise moves among samples of equal numbers only.
    """
    device = x_0.device
    x_0, x_1, c = (in_float64(x.flatten(1)) for x in (x_0, x_1, embedding))
    cost = torch.cdist(x_1 - x_1.mean(0) + x_0.mean(0), x_0).square() / x_0.shape[1]  # a shift does not change the best
    return _assigned(cost + weight * torch.cdist(c, c).square(), apart).to(device)


def _assigned(cost: torch.Tensor, context_ids: torch.Tensor) -> torch.Tensor:
    """Find the permutation (B,) within equal numbers (B,) of least cost (B, B), row by row; on the host."""
    from scipy.optimize import linear_sum_assignment

    host = torch.cat([cost.nan_to_num(), context_ids[:, None].to(cost)], dim=1).cpu()
    cost, context_ids = host[:, :-1], host[:, -1]
    index = torch.empty(len(cost), dtype=torch.long)
    for context in set(context_ids.tolist()):
        own = (context_ids == context).nonzero()[:, 0]
        costs = cost[own[:, None], own]
        costs = costs - costs.amin(1, keepdim=True)  # neither changes which is best; it is found sooner
        costs = costs - costs.amin(0)
        index[own] = own[torch.from_numpy(linear_sum_assignment(costs.numpy())[1])]
    return index


def _standardised(x: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Shift and scale the points (B, ...) of each context to mean zero and variance one: (B, N), float64.

    Of squared distances between two clouds neither changes the best assignment; between clouds that lie alike it is
    found in a tenth of the time. `same` (B, B) is 1 where two points have the same context, else 0.
    """
    x, n = in_float64(x.flatten(1)), same.sum(1, keepdim=True)
    x = x - same @ x / n
    scale = (same @ x.square().mean(1, keepdim=True) / n).sqrt()
    return x / scale.clamp_min(torch.finfo(x.dtype).tiny)
