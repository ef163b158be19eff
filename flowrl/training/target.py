"""The tilt that an algorithm aims at, in the same units for all: lambda of `q_ref e^(lambda r) / Z`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from flowrl.errors import ConfigError
from flowrl.functional.losses import group_mean
from flowrl.types import Batch

if TYPE_CHECKING:
    from flowrl.training.algorithm import FlowAlgorithm


def spread(rollout: Batch, group_size: int) -> torch.Tensor:
    """Compute the rewards' standard deviation, within groups where there are any, pooled; a scalar tensor."""
    reward = rollout.reward
    if group_size > 1:
        reward = reward - group_mean(reward, rollout.group, len(reward))
    return reward.std(correction=0)


def check_target(model: FlowAlgorithm) -> None:
    """Check that `target_lambda` goes with an algorithm that has a setting for it.

    Raises:
        ConfigError: It does not.
    """
    if model.config.target_lambda and model.tilt_setting is None:
        raise ConfigError(_no_tilt(model))


def aim(model: FlowAlgorithm, rollout: Batch) -> None:
    """Set an algorithm's own coefficient so that it aims at `target_lambda`, by the rewards of the first iteration.

    Raises:
        ConfigError: It states no tilt that it aims at, or rewards are all alike.
    """
    target, setting = model.config.target_lambda, model.tilt_setting
    if not target or model.iteration:
        return
    reward_std = spread(rollout, model.config.group_size)
    now = model.tilt_of(reward_std)
    if now is None or setting is None:
        raise ConfigError(_no_tilt(model))
    factor = target / float(now)
    if not 0 < factor < float("inf"):
        raise ConfigError("The rewards of the first iteration are all alike: target_lambda needs their spread.")
    name, power = setting
    value = getattr(model.config, name) * factor**power
    model.config = replace(model.config, **{name: value, "target_lambda": 0.0})


def _no_tilt(model: FlowAlgorithm) -> str:
    own = model.name or type(model).__name__
    return f"{own} states no tilt that it aims at with these settings: leave target_lambda out."
