"""Optimizers of the trained parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from flowrl.config import FlowConfig
from flowrl.errors import ConfigError


def make_optimizer(config: FlowConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the settings ask for.

    Raises:
        ConfigError: Its package is not installed; gives the command.
    """
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        # fused: the other implementations read their step counter on the host
        return torch.optim.AdamW(list(parameters), fused=True, **settings)  # type: ignore[arg-type]
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f'The optimizer "adamw8bit" needs bitsandbytes: pip install "flowrl-torch[8bit]" ({error}).'
        ) from error
    return AdamW8bit(list(parameters), **settings)


def step_unless(bad: torch.Tensor, optimizer: torch.optim.Optimizer, is_sharded: bool = False) -> None:
    """An optimizer step, unless `bad` (a scalar, 0 or 1) is 1: then weights and moments stay as they are.

    Fused optimizers decide that on the device; others wait for it.
    """
    if optimizer.defaults.get("fused") and not is_sharded:
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif not bool(bad):
        optimizer.step()


def state_shapes(config: FlowConfig, parameter: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the optimizer keeps of a parameter, by which a stored state is checked."""
    shape = tuple(parameter.shape)
    if config.optimizer == "adamw":
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    shapes = {"step": (), "state1": shape, "state2": shape}
    if parameter.numel() >= SMALLEST_QUANTISED:
        blocks = (math.ceil(parameter.numel() / BLOCK),)
        shapes |= {"qmap1": (256,), "qmap2": (256,), "absmax1": blocks, "absmax2": blocks}
    return shapes


SMALLEST_QUANTISED = 4096
"""bitsandbytes keeps the moments of smaller parameters in float32."""
BLOCK = 256
"""Values that share a scale in bitsandbytes' 8-bit moments."""
