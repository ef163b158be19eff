"""A velocity U-Net for pairs of permeability and pressure, with latents scaled as the equation between them asks."""

from __future__ import annotations

import torch
from torch import nn

from flowrl.checks import is_finite
from flowrl.errors import ConfigError
from flowrl.functional.darcy import SOURCE, sines
from flowrl.models.base import VelocityModel
from flowrl.models.unet import UNetFlow, UNetShape

LARGEST = 1e3
"""Of the numbers that scale latents."""


def check_scales(shape: UNetShape, scale: float = 1.0, order: float = 1.5, log_scale: float = 1.0) -> None:
    """Check what a config.json says of a flow.

    Raises:
        ConfigError: Other than two channels, fewer than four nodes, or numbers without meaning.
    """
    if shape.channels != 2 or shape.size < 4:
        raise ConfigError(
            "A flow of permeability and pressure has 2 channels and a size of at least 4, not "
            f"{shape.channels} and {shape.size}."
        )
    for name, number, least in (("scale", scale, 1e-6), ("order", order, 0.0), ("log_scale", log_scale, 1e-6)):
        if not (is_finite(number) and least <= number <= LARGEST):
            raise ConfigError(f"{name} must be a number from {least:g} to {LARGEST:g}, not {number!r}.")


class DarcyFlow(UNetFlow):
    """A U-Net whose samples are pairs (2, size, size): log K, and the pressure p in its own units.

    Latents are log K / log_scale, and `u` of `p = p_1 + scale (-laplace)^(-order / 2) u`, where p_1 is the pressure for
    K = 1. The equation takes two derivatives of p, so an error of a plain p from node to node would count
    (size - 1)^4 times in its squared residual; of u it counts (size - 1)^(4 - 2 order) times. The power is that of the
    five-point stencil with p = 0 on the walls; nodes on the walls are plain, in units of the filter's gain for white
    noise.

    Args:
        shape: Sizes of the network; two channels.
        scale: Standard deviation of the data's `u` where it is 1 here.
        order: Derivatives of p that u has.
        log_scale: Standard deviation of the data's log K.
    """

    vectors: torch.Tensor
    gains: torch.Tensor
    uniform: torch.Tensor

    def __init__(self, shape: UNetShape, scale: float = 1.0, order: float = 1.5, log_scale: float = 1.0) -> None:
        super().__init__(shape)
        check_scales(shape, scale, order, log_scale)
        self.log_scale = log_scale
        vectors, values = sines(shape.size)
        spectrum = values[:, None] + values
        uniform = vectors @ ((vectors @ torch.full_like(spectrum, SOURCE) @ vectors) / spectrum) @ vectors
        self.register_buffer("vectors", vectors.float(), persistent=False)
        self.register_buffer("gains", (scale * spectrum ** (-order / 2)).float(), persistent=False)
        self.register_buffer("uniform", nn.functional.pad(uniform, (1, 1, 1, 1)).float(), persistent=False)

    def move_frozen(self, device: torch.device) -> None:
        """Keep the classes and the filter on `device` from now on."""
        super().move_frozen(device)
        VelocityModel.move_frozen(self, device)

    def decode(self, x_1: torch.Tensor) -> torch.Tensor:
        """Decode to log K and p, (B, 2, size, size)."""
        u = x_1[:, 1]
        inner = self.vectors @ (self.gains * (self.vectors @ u[:, 1:-1, 1:-1] @ self.vectors)) @ self.vectors
        walls = u * self.gains.square().mean().sqrt() * self._walls(u)
        p = self.uniform + walls + nn.functional.pad(inner, (1, 1, 1, 1))
        return torch.stack([self.log_scale * x_1[:, 0], p], dim=1)

    def encode_samples(self, samples: torch.Tensor) -> torch.Tensor:
        """Encode log K and p (B, 2, size, size) as the flow takes them: the inverse of `decode`."""
        p = samples[:, 1] - self.uniform
        inner = self.vectors @ ((self.vectors @ p[:, 1:-1, 1:-1] @ self.vectors) / self.gains) @ self.vectors
        walls = p / self.gains.square().mean().sqrt() * self._walls(p)
        return torch.stack([samples[:, 0] / self.log_scale, walls + nn.functional.pad(inner, (1, 1, 1, 1))], dim=1)

    @staticmethod
    def _walls(fields: torch.Tensor) -> torch.Tensor:
        """Give 1 at the nodes on the walls, 0 elsewhere, (size, size)."""
        inner = torch.zeros(fields.shape[-1] - 2, fields.shape[-1] - 2, dtype=fields.dtype, device=fields.device)
        return nn.functional.pad(inner, (1, 1, 1, 1), value=1.0)
