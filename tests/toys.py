"""Toys of which a closed form is known: Gaussians whose flow is the exact field plus a narrow correction.

What an algorithm makes of a flow is seen with a correction a quarter as wide as the shipped network of `gaussians-*`,
at a tenth of its cost, and without that network's own errors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flowrl.envs.gaussians import GaussianMixture, GaussiansEnv, LinearReward, eight_gaussians
from flowrl.models.mlp import FieldFlow

RATE = 4e-3
"""Learning rate for corrections of this width."""


def narrow(mixture: GaussianMixture, reward: Callable[[torch.Tensor], torch.Tensor]) -> GaussiansEnv:
    """The environment of a mixture and a reward."""
    return GaussiansEnv(mixture, reward, flow=lambda: FieldFlow(mixture.velocity, mixture.dim, width=64))


def narrow_linear() -> GaussiansEnv:
    """As `gaussians-linear`."""
    return narrow(eight_gaussians(), LinearReward((1.0, 0.0)))
