"""HiDream's transformer in training: gradients of its routed experts, latents from the patches that it gives."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn


def keep_gradients(network: nn.Module) -> None:
    """Let routed experts have gradients in evaluation mode, too (in place)."""
    module: Any
    for module in network.modules():
        if hasattr(module, "moe_infer"):
            module.moe_infer = MethodType(_mixture, module)


def _mixture(self: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mix routed experts of tokens `x` (N, dim): `chosen` (N k,) by each of them, with `weights` (N k, 1)."""
    mixed = torch.zeros_like(x)
    for index, expert in enumerate(self.experts):
        choices = (chosen == index).nonzero()[:, 0]
        tokens = choices // self.num_activated_experts
        mixed = mixed.index_add(0, tokens, (expert(x[tokens]) * weights[choices]).to(x.dtype))
    return mixed


def latents_of(patches: torch.Tensor, shape: tuple[int, ...], side: int) -> torch.Tensor:
    """Bring patches (B, C, patches, side^2), of which there may be too many, into the shape of latents."""
    channels, height, width = shape
    grid = patches[:, :, : height * width // side**2].reshape(-1, channels, height // side, width // side, side, side)
    return grid.transpose(3, 4).reshape(-1, channels, height, width)
