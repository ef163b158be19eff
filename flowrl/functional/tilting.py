"""Weights of self-consistent tilting: pure functions of tensors."""

from __future__ import annotations

import torch

LARGEST = 1e30
"""Ratio beyond which a weight is 1 / pi to the last bit."""


def tilt_level(reference: torch.Tensor, tau: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the largest reward r_0 of each context (C,), and `Z e^(-tau r_0)` (C,), its mean of `e^(tau (r - r_0))`.

    Args:
        reference: Rewards (C, M) of reference samples of each context.
        tau: Inverse temperature of the tilt.
    """
    top = reference.amax(1)
    e = (tau * (reference - top[:, None])).exp()
    least = e.amin(1)
    return top, least + (e - least[:, None]).mean(1)  # exactly one where all rewards agree


def tilt_ratio(
    reward: torch.Tensor, level: tuple[torch.Tensor, torch.Tensor], tau: float | torch.Tensor
) -> torch.Tensor:
    """Compute `rho = e^(tau r) / Z` (B,): how much likelier a sample is under the tilt than under the reference.

    Args:
        reward: r (B,).
        level: What `tilt_level` gives for the context of each sample, (B,) and (B,).
        tau: Inverse temperature of the tilt.

    Returns:
        The ratio, at most `LARGEST`; exactly one where all rewards agree.
    """
    top, z = level
    return ((tau * (reward - top)).exp() / z).clamp_max(LARGEST)


def mixture_weight(rho: torch.Tensor, pi: float) -> torch.Tensor:
    """Compute `w = rho / (1 + pi (rho - 1))` (B,), between 0 and `1 / pi`: the tilt over the mixture it is learnt from.

    The mixture holds a share `1 - pi` of the reference and `pi` of a policy; the weight is what it would be if the
    policy were the tilt already. The tilt is the only distribution that regression with these weights leaves as it is.
    """
    return rho / (1 + pi * (rho - 1))
