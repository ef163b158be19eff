"""Schedulers of diffusers as sampling times: those that a flow can have, and their noise levels in order."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from flowrl.checks import is_whole, shown
from flowrl.errors import ConfigError, ModelLoadError

TIMESTEPS = 1000
"""Training timesteps of a scheduler that does not say: the factor of its noise levels for the network."""
FIRST_LEVEL = 0.98
"""Schedules of samplers for diffusion begin a little below 1; below this a schedule begins elsewhere."""
REMEDY = "Save it with FlowMatchEulerDiscreteScheduler: pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=...)."


def check_scheduler(name: Any, config: Mapping[str, Any], what: str, inverted: bool = False) -> None:
    """Look at a scheduler's configuration before any weight is read.

    Args:
        name: Its class.
        config: Its configuration.
        what: The pipeline that it is of, for messages.
        inverted: Whether such a pipeline's schedulers say `invert_sigmas`.

    Raises:
        ModelLoadError: It is none of a flow, or its time runs the other way.
    """
    predicts = config.get("prediction_type")
    is_flow = str(name).startswith("FlowMatch") or (predicts == "flow_prediction" and config.get("use_flow_sigmas"))
    if not is_flow:
        raise ModelLoadError(
            f"The scheduler of {what} is a {shown(name)} with prediction_type {shown(predicts)} and use_flow_sigmas "
            f"{shown(config.get('use_flow_sigmas'))}, which samples no flow. {REMEDY}"
        )
    if config.get("invert_sigmas") and not inverted:
        raise ModelLoadError(
            f"The scheduler of {what} says invert_sigmas: its time runs from data to noise, and the network of this "
            f"pipeline takes the other direction. {REMEDY}"
        )
    if inverted and not config.get("invert_sigmas"):
        raise ModelLoadError(
            f"The scheduler of {what} does not say invert_sigmas, and the network of this pipeline takes a time that "
            "runs from noise to data. Save it with FlowMatchEulerDiscreteScheduler(invert_sigmas=True)."
        )
    steps = config.get("num_train_timesteps", TIMESTEPS)
    if not is_whole(steps, 1, 10**6):
        raise ModelLoadError(f"The scheduler of {what} says num_train_timesteps = {shown(steps)}. {REMEDY}")


def times_of(scheduler: Any, steps: int, sigmas: np.ndarray | None = None, mu: float | None = None) -> torch.Tensor:
    """Read a scheduler's noise levels as times (steps + 1,) from 0 to 1.

    Levels that a solver of higher order repeats count once, the first is taken as 1 and the last as 0: solvers of
    diffusion stop a little before both.

    Args:
        scheduler: Scheduler of a flow, see `check_scheduler`; its state changes.
        steps: Number of steps.
        sigmas: Levels to hand to it, where it takes any.
        mu: Shift by the resolution, of a schedule that depends on it.

    Raises:
        ConfigError: It takes no shift, or its levels do not fall from 1 to 0 in so many steps.
    """
    name, takes = type(scheduler).__name__, inspect.signature(scheduler.set_timesteps).parameters
    given: dict[str, Any] = {}
    if sigmas is not None and "sigmas" in takes:
        given["sigmas"] = sigmas
    if mu is not None:
        if "mu" not in takes:
            raise ConfigError(f"The pipeline's {name} cannot be shifted by the resolution, as it says. {REMEDY}")
        given["mu"] = mu
    scheduler.set_timesteps(steps, **given)
    levels = scheduler.sigmas.float().cpu()
    if steps == 1 and bool(levels.isnan().any()):
        raise ConfigError(
            f"The pipeline's {name} has no noise levels for one step, as it scales the last of several "
            "(shift_terminal): take two steps or more."
        )
    levels = torch.unique_consecutive(1 - levels if scheduler.config.get("invert_sigmas") else levels)
    levels = torch.cat([levels[levels > 0], torch.zeros(1)])
    falls = bool((levels[1:] < levels[:-1]).all())
    if len(levels) != steps + 1 or not falls or not FIRST_LEVEL <= levels[0] <= 1:
        raise ConfigError(
            f"The pipeline's {name} gives the noise levels {[round(level, 4) for level in levels[:6].tolist()]}... for "
            f"{steps} steps: they must fall from 1 to 0, one for each step. {REMEDY}"
        )
    levels[0] = 1
    return 1 - levels
