"""A small generator of pictures from latents: what `pretrain/latent_digits.py` trains."""

from __future__ import annotations

import torch
from torch import nn


class PictureDecoder(nn.Module):
    """Generator of grey pictures, z (B, dim) -> (B, 1, size, size) in [0, 1]: a multilayer perceptron.

    Args:
        dim: Dimension of z.
        size: Height and width of a picture in pixels.
        width: Width of the hidden layers.
        depth: Number of hidden layers.
    """

    def __init__(self, dim: int, size: int, width: int, depth: int) -> None:
        super().__init__()
        self.size = size
        layers: list[nn.Module] = [nn.Linear(dim, width), nn.SiLU()]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, size**2))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Generate pictures."""
        return self.layers(z).sigmoid().view(-1, 1, self.size, self.size)
