"""Data of `darcy`: random permeability fields of two kinds, and the pressures that they cause."""

from __future__ import annotations

import math

import torch

from flowrl.functional.darcy import solve

KINDS = ("lognormal", "two-phase")
"""Contexts: log K a Gaussian field; or one of two values, by the sign of a Gaussian field."""
LENGTHS = {"lognormal": 0.1, "two-phase": 0.15}
"""Correlation lengths l of the Gaussian fields, of covariance `exp(-|x - x'|^2 / (2 l^2))`, in sides of the square."""
CONTRAST = math.log(2)
"""Standard deviation of log K of the first kind; the second has -CONTRAST and CONTRAST, permeabilities 1/2 and 2."""


def random_log_k(kinds: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw log K (n, size, size) of these kinds, indices (n,) into `KINDS`, on the CPU.

    Values at a node have mean 0 and variance CONTRAST^2 for both kinds. The covariance is a product over the two
    directions, so a field is `R Z R^T` with white noise Z and a square root R of one direction's covariance.
    """
    x = torch.linspace(0, 1, size, dtype=torch.float64)
    noise = torch.randn(len(kinds), size, size, generator=generator).double()
    fields = torch.empty_like(noise)
    for index, kind in enumerate(KINDS):
        values, vectors = torch.linalg.eigh((-((x[:, None] - x) ** 2) / (2 * LENGTHS[kind] ** 2)).exp())
        root = vectors * values.clamp_min(0).sqrt() @ vectors.T
        drawn = root @ noise[kinds == index] @ root
        fields[kinds == index] = drawn if kind == "lognormal" else drawn.sign()
    return (CONTRAST * fields).float()


def solved_pairs(n: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw pairs (n, 2, size, size) of log K and the pressure that solves Darcy's equation, and their kinds (n,)."""
    kinds = torch.arange(n) % len(KINDS)
    log_k = random_log_k(kinds, size, generator)
    return torch.stack([log_k, solve(log_k)], dim=1), kinds
