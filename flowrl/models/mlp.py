"""A velocity network for low dimensions: a residual MLP with Fourier features of time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from flowrl.models.base import VelocityModel
from flowrl.types import Condition


class TimeFeatures(nn.Module):
    """Features of times, t (B,) -> (B, 2 n): sines and cosines of t at frequencies 1/2, 1, 2, ... half turns."""

    frequencies: torch.Tensor

    def __init__(self, n: int = 6) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(-1, n - 1), persistent=False)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Compute features of flow times."""
        angle = t[:, None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class MLP(nn.Module):
    """Velocity network `(x (B, dim), t (B,), features (B, n)) -> v (B, dim)`: SiLU layers with residual connections.

    Args:
        dim: Dimension of x.
        width: Width of the hidden layers.
        depth: Number of hidden layers.
        zero_init: Start as the zero field, as a correction to another field needs it.
        n_features: Numbers that describe the context; 0 for an unconditional field, which takes none.
    """

    def __init__(
        self, dim: int, width: int = 256, depth: int = 3, zero_init: bool = False, n_features: int = 0
    ) -> None:
        super().__init__()
        self.time = TimeFeatures()
        self.inputs = nn.Linear(dim + 2 * len(self.time.frequencies) + n_features, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.output = nn.Linear(width, dim)
        if zero_init:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor, *features: torch.Tensor) -> torch.Tensor:
        """Compute the velocity at `x` and `t`."""
        h = self.inputs(torch.cat([x, self.time(t), *features], dim=1))
        for layer in self.hidden:
            h = h + layer(nn.functional.silu(h))
        return self.output(nn.functional.silu(h))


class ModuleFlow(VelocityModel):
    """Any `nn.Module` that maps `(x_t, t, *cond)` to a velocity, in the space of the samples."""

    def __init__(self, network: nn.Module, sample_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.latent_shape = self.sample_shape = tuple(sample_shape)


class FieldFlow(VelocityModel):
    """A known field plus a trainable correction that starts at zero.

    The flow starts exactly at `field`, e.g. `GaussianMixture.velocity`, and can be fine-tuned from there.

    Args:
        field: `(t (B,), x (B, dim)) -> v (B, dim)`.
        dim: Dimension of a sample.
        width: Width of the correction's hidden layers.
        depth: Number of its hidden layers.
    """

    def __init__(
        self,
        field: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        dim: int,
        width: int = 128,
        depth: int = 3,
    ) -> None:
        super().__init__()
        self.field = field
        self.network = MLP(dim, width, depth, zero_init=True)
        self.latent_shape = self.sample_shape = (dim,)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Add the correction to the known field."""
        return self.field(t, x_t) + self.network(x_t, t)
