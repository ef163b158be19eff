"""Side effects of training: rewards that it never saw, looks of images, size of velocities.

A reward that rises while these fall is the usual face of a reward that is exploited instead of met. A flow that has
diverged or collapsed is one whatever its reward did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flowrl.envs.base import check_reward
from flowrl.envs.rewards.aesthetic import colourfulness
from flowrl.envs.rewards.catalogue import RewardFunction
from flowrl.envs.rewards.frames import over_frames
from flowrl.errors import FlowRLError, RewardError, reason_of
from flowrl.functional import metrics
from flowrl.types import Contexts, RewardOutput

SIGNIFICANT = 2.58
"""Standard errors by which means must differ to count as different (99 %)."""
FALL = 0.25
"""Share by which diversity or a look must fall, or an error rise, for a warning."""
VELOCITY = (0.5, 2.0)
"""Ratios of the sizes of velocities outside which there is a warning."""
DIVERGED = 4.0
"""Drift in units of the mean squared velocity of the reference, and growth of diversity, above which a flow has
diverged: twice the reference's velocity in another direction is far beyond any reward's optimum."""


@dataclass(frozen=True)
class Comparison:
    """Means of the side measures and errors, of the reference and of the trained flow.

    Attributes:
        before: Name -> mean, of the reference's samples.
        after: Name -> mean, of the trained flow's samples.
        warnings: What fell (of errors: rose) while the reward rose, and signs of a flow that has diverged or
            collapsed, a text each.
    """

    before: dict[str, float]
    after: dict[str, float]
    warnings: tuple[str, ...]


def looks(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute statistics (B,) of images (B, 3, H, W) in [0, 1] that fall when they turn into flat or empty ones.

    Grey images (B, 1, H, W) have no colourfulness. Of videos (B, T, 3, H, W), means over their frames.
    """
    if images.ndim == 5:
        n, of_frames = len(images), looks(images.flatten(0, 1))
        return {name: value.view(n, -1).mean(1) for name, value in of_frames.items()}
    measured = {"entropy": metrics.entropy(images), "edge density": metrics.edge_density(images)}
    return measured if images.shape[1] == 1 else measured | {"colourfulness": colourfulness(images)}


def held_out(
    rewards: Mapping[str, RewardFunction], samples: torch.Tensor, contexts: Contexts
) -> dict[str, torch.Tensor]:
    """Compute values (B,) of rewards, by name; those of images are averaged over the frames of videos.

    Raises:
        RewardError: A reward raised, or is not one finite number per sample.
    """
    values = {}
    for name, reward in rewards.items():
        try:
            output = over_frames(reward)(samples.clone(), contexts)  # which it may change
        except FlowRLError:
            raise
        except Exception as error:
            raise RewardError(
                f"The held-out reward '{name}' raised {reason_of(error)} It was called with samples of "
                f"shape {tuple(samples.shape)} and {len(contexts)} contexts, the first {contexts[0]!r}."
            ) from error
        value = output.reward if isinstance(output, RewardOutput) else output
        values[f"held-out {name}"] = check_reward(value, samples, contexts, name)
    return values


def compare(
    reward: tuple[torch.Tensor, torch.Tensor],
    measured: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]],
    diversity: tuple[float, float],
    velocity_ratio: float,
    drift_share: float = math.nan,
    w2: tuple[float, float] = (math.nan, math.nan),
    errors: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]] = ({}, {}),
) -> Comparison:
    """Compare the reference (first of each pair) with the trained flow (second).

    Args:
        reward: The trained reward, (B,) each.
        measured: Results of `looks` and `held_out`.
        diversity: Diversity of the samples.
        velocity_ratio: `E|v| / E|v_ref|`; NaN where it was not measured.
        drift_share: `E|v - v_ref|^2 / E|v_ref|^2`; NaN where it was not measured.
        w2: Distances to the known optimum; NaN where there is none.
        errors: Errors by the environment's judges, (B,) each, or (1,) for one of all samples together.
    """
    before, after = (
        {name: value.mean().item() for name, value in [*part.items(), *errors[i].items()]}
        for i, part in enumerate(measured)
    )
    change = _change(*reward)
    warnings: list[str] = []
    if change > SIGNIFICANT:
        for name, old in measured[0].items():
            new = measured[1][name]
            is_reward = name.startswith("held-out ")
            far = is_reward or after[name] < (1 - FALL) * before[name]
            if far and _change(old, new) < -SIGNIFICANT:
                warnings.append(f"the reward rose while {name} fell from {before[name]:.4g} to {after[name]:.4g}")
        for name, old in errors[0].items():
            is_sure = len(old) == 1 or _change(old, errors[1][name]) > SIGNIFICANT
            if is_sure and after[name] > (1 + FALL) * before[name]:
                warnings.append(f"the reward rose while {name} rose from {before[name]:.4g} to {after[name]:.4g}")
    elif change < -SIGNIFICANT:
        was, became = (part.mean().item() for part in reward)
        warnings.append(f"the reward fell from {was:.4g} to {became:.4g}")
    return Comparison(before, after, (*warnings, *_of_the_flow(change, diversity, velocity_ratio, drift_share, w2)))


def _of_the_flow(
    change: float, diversity: tuple[float, float], velocity_ratio: float, drift_share: float, w2: tuple[float, float]
) -> list[str]:
    """Say what is wrong with the flow itself, whatever the reward did."""
    warnings, nears_optimum = [], w2[1] < w2[0]  # which may well be narrower and faster than the reference
    if drift_share > DIVERGED:
        warnings.append(
            f"the flow has diverged: its velocities differ from the reference's by {math.sqrt(drift_share):.3g} times "
            "the size of these (root mean square); lower the learning rate, or pull it to the reference more"
        )
    if diversity[1] < (1 - FALL) * diversity[0] and not nears_optimum:
        text = f"diversity fell from {diversity[0]:.4g} to {diversity[1]:.4g}"
        warnings.append(f"the reward rose while {text}" if change > SIGNIFICANT else text)
    elif diversity[1] > DIVERGED * diversity[0] > 0:
        warnings.append(
            f"diversity rose from {diversity[0]:.4g} to {diversity[1]:.4g}: samples have left where the reference's are"
        )
    if not math.isnan(velocity_ratio) and not VELOCITY[0] <= velocity_ratio <= VELOCITY[1] and not nears_optimum:
        warnings.append(f"velocities are {velocity_ratio:.3g} times as long as the reference's")
    return warnings


def _change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Compute the difference of two means in standard errors (Welch)."""
    difference = (after.mean() - before.mean()).item()
    error = math.sqrt(sum(x.var().item() / len(x) for x in (before, after))) if len(before) > 1 else math.inf
    return difference / error if error > 0 else math.copysign(math.inf, difference) if difference else 0.0
