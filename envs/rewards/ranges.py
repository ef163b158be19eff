"""Ranges of images: a reward that declares its range refuses others, which would be rewarded wrong without a word."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from flowrl.errors import ConfigError, RewardError

UNIT = (0.0, 1.0)
TOLERANCE = 0.05
"""Of the width of a range: decoders may overshoot by rounding and ringing. flowrl's own clamp."""


def guarded(reward: Any, name: str) -> Any:
    """Make a reward (a class or a function) check the range of its images.

    Args:
        reward: The reward; its `takes`, if any, is the least and the greatest value that its images may have.
        name: Its name in messages.

    Returns:
        The class itself, or the function in another one; without `takes` the reward as it is.
    """
    takes = getattr(reward, "takes", None)
    if takes is None:
        return reward
    low, high = _read(takes, name)
    if not inspect.isclass(reward):
        return _watched(reward, name, low, high)
    reward.__call__ = _watched(reward.__call__, name, low, high)  # type: ignore[method-assign]
    return reward


def _read(takes: Any, name: str) -> tuple[float, float]:
    try:
        low, high = (float(edge) for edge in takes)
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if not low < high:
        raise ConfigError(f"The reward '{name}' must say `takes = (LEAST, GREATEST)`, two numbers, not {takes!r}.")
    return low, high


def _watched(call: Callable[..., Any], name: str, low: float, high: float) -> Callable[..., Any]:
    inner = getattr(call, "unwatched", call)  # inherited: looked at once, under the name that is used

    @functools.wraps(inner)
    def watching(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                check_range(value, name, low, high)
        return inner(*args, **kwargs)

    watching.unwatched = inner  # type: ignore[attr-defined]
    return watching


def check_range(images: torch.Tensor, name: str, low: float = 0.0, high: float = 1.0) -> None:
    """Look at the least and the greatest value, on the images' device; the answer is one synchronisation.

    Raises:
        RewardError: Images that are no floating-point numbers, not finite, or out of the range; says the remedy.
    """
    if images.numel() == 0:
        return
    wanted = f"The reward '{name}' takes images with values in [{low:g}, {high:g}]"
    pixels = images.detach()
    if not pixels.is_floating_point():
        remedy = "Divide them by 255: images.float() / 255." if (low, high) == UNIT else "Convert and scale them."
        raise RewardError(f"{wanted}; these are whole numbers ({images.dtype}). {remedy}")
    least, greatest = torch.stack(torch.aminmax(pixels)).tolist()
    slack = TOLERANCE * (high - low)
    if low - slack <= least and greatest <= high + slack:
        return
    if not (abs(least) < float("inf") and abs(greatest) < float("inf")):
        raise RewardError(
            f"{wanted}; these hold values that are not finite (from {least:g} to {greatest:g}): look at what drew them."
        )
    raise RewardError(f"{wanted}; these go from {least:.3g} to {greatest:.3g}. {_remedy(least, greatest, (low, high))}")


def _remedy(least: float, greatest: float, takes: tuple[float, float]) -> str:
    if takes != UNIT:
        return "Scale them."
    if least >= -1 - TOLERANCE and greatest <= 1 + TOLERANCE:
        return "They look like [-1, 1]: pass images / 2 + 0.5."
    if least >= 0 and 2 < greatest <= 255:
        return "They look like [0, 255]: pass images / 255."
    return "Scale them; where a decoder overshoots, clamp them: images.clamp(0, 1)."
