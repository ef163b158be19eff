"""The affine between a flow's latents and its autoencoder's, as the autoencoder's configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def from_autoencoder(z: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Bring latents (B, C, ...) of an autoencoder to the scale of the flow's: the inverse of `to_autoencoder`."""
    scale, mean, std = (config.get(key) for key in ("scaling_factor", "latents_mean", "latents_std"))
    scale = 1.0 if scale is None else scale
    if mean is None or std is None:
        return (z - (config.get("shift_factor") or 0.0)) * scale
    shape = (1, -1, *(1,) * (z.ndim - 2))
    return (z - z.new_tensor(mean).view(shape)) / (z.new_tensor(std).view(shape) / scale)


def by_weights(z: torch.Tensor, vae: Any) -> torch.Tensor:
    """Bring latents (B, C, T', H', W') of an autoencoder to a mean and a deviation that are weights of it."""
    mean, std = (weight.to(z).view(1, -1, 1, 1, 1) for weight in (vae.latents_mean, vae.latents_std))
    scaled: torch.Tensor = (z - mean) / std
    return scaled


def to_autoencoder(x: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Bring latents (B, C, ...) of a flow to the scale of the autoencoder that decodes them.

    By a mean and a deviation for each channel (`latents_mean`, `latents_std`, the latter over `scaling_factor`), or
    else by `scaling_factor` and `shift_factor`; what the configuration does not say is left out.
    """
    scale, mean, std = (config.get(key) for key in ("scaling_factor", "latents_mean", "latents_std"))
    scale = 1.0 if scale is None else scale
    if mean is None or std is None:
        return x / scale + (config.get("shift_factor") or 0.0)  # older configurations have no shift
    shape = (1, -1, *(1,) * (x.ndim - 2))
    return x * (x.new_tensor(std).view(shape) / scale) + x.new_tensor(mean).view(shape)
