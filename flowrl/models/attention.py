"""Attention backends of diffusers: kernels that networks of diffusers can compute their attention with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flowrl.errors import ConfigError
from flowrl.models.imports import importing
from flowrl.models.long_prompts import silenced

PROBE = (1, 128, 2, 64)
"""Batch, tokens, heads and width of a head of what is tried before a backend is taken."""


def set_attention_backend(network: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Let a network, and those within it, compute attention by a backend of diffusers.

    It is tried first on the device in the type that networks compute in, gradients included. Only this network is
    changed: networks that are made later in the same process have diffusers' own choice. An empty name does nothing.

    Raises:
        ConfigError: diffusers knows no such backend or cannot use it here (lists those that it can), it gives no
            gradients, or the network is not of diffusers, or has attention that takes no backend.
    """
    if not name:
        return
    networks: list[Any] = [module for module in network.modules() if hasattr(module, "set_attention_backend")]
    if not networks:
        raise ConfigError(
            f"attention_backend is for networks of diffusers, which a {type(network).__name__} is not: leave it out."
        )
    takers = [m for m in network.modules() if hasattr(getattr(m, "processor", None), "_attention_backend")]
    if not takers:
        raise ConfigError(
            f"A {type(networks[0]).__name__} of the installed diffusers computes attention by torch's "
            "scaled_dot_product_attention alone, which chooses its kernel itself: leave attention_backend out."
        )
    usable = usable_backends()
    if name not in usable:
        raise ConfigError(
            f"attention_backend '{name}' cannot be used: {_why_not(name)}. Those that the installed diffusers can use "
            f"here: {', '.join(usable)}."
        )
    _try_out(name, device, dtype)
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    active = Registry._active_backend
    with silenced():  # it warns that the feature is experimental
        for part in networks:
            part.set_attention_backend(name)
    Registry.set_active_backend(active)


def usable_backends() -> list[str]:
    """List the backends of the installed diffusers whose packages are there, without those that fetch code."""
    with importing():
        from diffusers.models.attention_dispatch import AttentionBackendName
    return [kind.value for kind in AttentionBackendName if not _why_not(kind.value)]


def _why_not(name: str) -> str:
    """Say why a backend cannot be used; nothing where it can."""
    from diffusers.models import attention_dispatch as dispatch

    known = {kind.value: kind for kind in dispatch.AttentionBackendName}
    if name not in known:
        return "diffusers knows none of this name"
    if known[name] in dispatch._HUB_KERNELS_REGISTRY:
        return "it would fetch code from the hub and run it"
    try:
        dispatch._check_attention_backend_requirements(known[name])
    except (RuntimeError, ValueError, ImportError) as error:
        return str(error).splitlines()[0].rstrip(".")
    return ""


def _try_out(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Compute attention and its gradients once.

    Raises:
        ConfigError: That fails, or gives no gradients.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    made = [torch.linspace(-1, 1, torch.Size(PROBE).numel(), device=device).view(PROBE).to(dtype) for _ in range(3)]
    inputs = [part.requires_grad_() for part in made]
    try:
        with torch.enable_grad(), silenced():
            query, key, value = inputs
            computed = dispatch_attention_fn(query, key, value, backend=AttentionBackendName(name))
            computed.float().square().sum().backward()
    except Exception as error:  # anything that a kernel says
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(f"attention_backend '{name}' does not work on {device} in {dtype}: {said}") from error
    if not all(part.grad is not None and bool(part.grad.isfinite().all()) for part in inputs):
        raise ConfigError(f"attention_backend '{name}' gives no gradients, which training needs: take another.")
