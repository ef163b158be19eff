"""Weights of self-consistent tilting: pure functions of tensors."""

from __future__ import annotations

import torch

LARGEST = 1e30
"""Ratio beyond which a weight is 1 / pi to the last bit."""


def tilt_ratio(reward: torch.Tensor, reference: torch.Tensor, tau: float | torch.Tensor) -> torch.Tensor:
    """Compute `rho = e^(tau r) / Z` (B,): how much likelier a sample is under the tilt than under the reference.

    Args:
        reward: r (B,).
        reference: Rewards (B, M) of reference samples of the same contexts; `Z` is their mean of `e^(tau r)`.
        tau: Inverse temperature of the tilt.

    Returns:
        The ratio, at most `LARGEST`; exactly one where all rewards agree.
    """
    top = reference.amax(1)
    e = (tau * (reference - top[:, None])).exp()
    least = e.amin(1)
    z = least + (e - least[:, None]).mean(1)
    return ((tau * (reward - top)).exp() / z).clamp_max(LARGEST)


def mixture_weight(rho: torch.Tensor, pi: float) -> torch.Tensor:
    """Compute `w = rho / (1 + pi (rho - 1))` (B,), between 0 and `1 / pi`: the tilt over the mixture it is learnt from.

    The mixture holds a share `1 - pi` of the reference and `pi` of a policy; the weight is what it would be if the
    policy were the tilt already. The tilt is the only distribution that regression with these weights leaves as it is.
    """
    return rho / (1 + pi * (rho - 1))
