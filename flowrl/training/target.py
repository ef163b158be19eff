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


def unit_of(model: FlowAlgorithm, rollout: Batch) -> torch.Tensor:
    """Compute the spread that an algorithm's rewards are in units of; a scalar tensor.

    It is that of the iteration or within contexts where `standardise` divides by it, else within groups.
    """
    kind, reward = getattr(model.config, "standardise", "none"), rollout.reward
    if kind == "none":
        return spread(rollout, model.config.group_size)
    if kind == "group":
        reward = reward - group_mean(reward, rollout.context_ids, len(model.env.core.contexts))
    return reward.std(correction=0)


def check_target(model: FlowAlgorithm) -> None:
    """Check that `target_lambda` goes with an algorithm that has a setting for it.

    Raises:
        ConfigError: It does not.
    """
    if model.config.target_lambda and model.tilt_setting is None:
        raise ConfigError(_no_tilt(model))


def aim(model: FlowAlgorithm, rollout: Batch) -> None:
    """Set an algorithm's own coefficient so that it aims at `target_lambda`, by the rewards of the first iteration, and
    once more where it is loaded with another target or in another environment.

    What an environment recommends is left out where an algorithm states no tilt with the settings that it has.

    Raises:
        ConfigError: It states no tilt that it aims at, or rewards are all alike.
    """
    target, setting = model.config.target_lambda, model.tilt_setting
    if not target or model.is_aimed:  # it was set before, and is in the config
        return
    now = None if _hides_rewards(model) else _stated(model, rollout)
    if now is None and target == model.env.core.recommended.get("target_lambda"):
        model.config = replace(model.config, target_lambda=0.0)
        return
    if now is None or setting is None:
        raise ConfigError(_no_tilt(model))
    factor = target / float(now)
    if not 0 < factor < float("inf"):
        raise ConfigError("The rewards of the first iteration are all alike: target_lambda needs their spread.")
    name, power = setting
    value = getattr(model.config, name) * factor**power
    model.config = replace(model.config, **{name: value})
    model.is_aimed = True


def aimed(model: FlowAlgorithm, rollout: Batch) -> torch.Tensor | None:
    """Compute the lambda that an algorithm aims at, with the rewards of an iteration; None where none is stated."""
    now = None if _hides_rewards(model) else _stated(model, rollout)
    return now if now is None or not _holds(model) else torch.full_like(now, model.config.target_lambda)


def held(model: FlowAlgorithm, rollout: Batch, coefficient: torch.Tensor) -> torch.Tensor:
    """Hold advantages (B,) at `target_lambda` while the spread of the rewards, whose unit they may have, changes.

    They are scaled by the target over what the coefficient aims at by now: advantages that are divided by a spread are
    then in units of the first iteration's, for good. Otherwise the tilt would grow as rewards come closer together.
    """
    now = _stated(model, rollout) if _holds(model) else None
    return coefficient if now is None else coefficient * (model.config.target_lambda / now)


def _stated(model: FlowAlgorithm, rollout: Batch) -> torch.Tensor | None:
    if model.tilt_setting is None:
        return None
    unit = unit_of(model, rollout)
    now = model.tilt_of(unit)
    model.checks.tilt_of(now)
    return None if now is None else torch.as_tensor(now, dtype=unit.dtype, device=unit.device)


def _hides_rewards(model: FlowAlgorithm) -> bool:
    """Tell whether samples keep their own noise: rewards then move the flow only where paths cross, to no tilt."""
    return getattr(model.config, "coupling", "") == "rectified"


def _holds(model: FlowAlgorithm) -> bool:
    return model.config.target_lambda > 0 and model.compares and not model.has_weights


def _no_tilt(model: FlowAlgorithm) -> str:
    own = model.name or type(model).__name__
    return f"{own} states no tilt that it aims at with these settings: leave target_lambda out."
