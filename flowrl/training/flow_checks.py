"""What a flow of one's own gives to a policy, checked before anything is made of it: conditions, times, samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flowrl.checks import described, shown
from flowrl.errors import ConfigError, raised_by, tell_whose
from flowrl.models.base import VelocityModel
from flowrl.training.construction import on_device
from flowrl.types import Condition, has_values


def condition(model: VelocityModel, given: Any, device: torch.device, n: int | None = None) -> Condition:
    """Move a condition to a device, wherever the flow makes it, without what led to it.

    Args:
        model: The flow.
        given: What its `encode` or `null_condition` gave.
        device: The device.
        n: How many contexts it is of; None leaves that open.

    Raises:
        ConfigError: It is no tuple of tensors with a row for each context.
    """
    parts: Any = given if isinstance(given, tuple | list) else [None]
    if not all(isinstance(part, torch.Tensor) and part.dim() and len(part) == (n or len(part)) for part in parts):
        rows = "a row" if n is None else f"{n} rows"
        raise ConfigError(
            f"The condition that {type(model).__name__} gives must be a tuple of tensors, each with {rows} for its "
            f"contexts, such as (embeddings,), not {described(given)}."
        )
    return on_device(tuple(part.detach() for part in parts), device)


def encoded(model: VelocityModel, contexts: Sequence[Any], device: torch.device) -> Condition:
    """Encode contexts, to a condition on a device.

    Raises:
        ConfigError: The flow does not know one of them, or gives no condition.
    """
    with raised_by(f"{type(model).__name__}.encode, for {shown(contexts)},"):
        given = model.encode(contexts)
    return condition(model, given, device, len(contexts))


def times(model: VelocityModel, steps: int, device: torch.device) -> torch.Tensor:
    """Give the times (steps + 1,) of the flow's sampler, on the device.

    Raises:
        ConfigError: They are not that many, or do not rise within [0, 1].
    """
    given = model.times(steps)
    fits = isinstance(given, torch.Tensor) and given.shape == (steps + 1,)
    if fits and has_values(given):
        fits = bool((given.diff() >= 0).all()) and 0 <= float(given[0]) < float(given[-1]) <= 1
    if not fits:
        raise ConfigError(
            f"{type(model).__name__}.times({steps}) must give a tensor of {steps + 1} times that rise from 0 (noise) "
            f"to 1 (data), not {shown(given)}."
        )
    return given.to(device)


def samples(model: VelocityModel, x_1: torch.Tensor) -> torch.Tensor:
    """Decode latents (B, *latent_shape) to samples (B, *sample_shape).

    Raises:
        ConfigError: The flow gives no tensor with a row for each.
    """
    try:
        given = model.decode(x_1)
    except Exception as error:
        tell_whose(error, f"{type(model).__name__}.decode, which makes samples of the flow's latents")
        raise
    if not isinstance(given, torch.Tensor) or given.shape[:1] != x_1.shape[:1]:
        raise ConfigError(
            f"{type(model).__name__}.decode must give a tensor of {len(x_1)} samples for as many latents, not "
            f"{described(given)}."
        )
    return given
