"""Rewards of images on videos: the mean over the frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flowrl.checks import in_all
from flowrl.types import Contexts, RewardOutput

MEAN_OVER_FRAMES = "the mean over the frames"


def over_frames(reward: Callable[[torch.Tensor, Contexts], Any]) -> Callable[..., Any]:
    """Make a reward of images take videos too: samples (B, T, 3, H, W) are given to it a frame (B, 3, H, W) at a time.

    Rewards and components are means over the frames; groups of samples of a prompt stay together. A reward that says
    `takes_videos = True`, or a method of one, is given whole videos.
    """
    if getattr(getattr(reward, "__self__", reward), "takes_videos", False):
        return reward

    def of_samples(samples: torch.Tensor, contexts: Contexts) -> Any:
        if samples.ndim != 5:
            return reward(samples, contexts)
        outputs = [reward(frame, contexts) for frame in samples.unbind(1)]
        if not isinstance(outputs[0], RewardOutput):
            return _mean(outputs)
        parts = [output.components for output in outputs]
        components = {name: _mean([part[name] for part in parts]) for name in in_all(parts)}
        return RewardOutput(_mean([o.reward for o in outputs]), components, outputs[0].info)

    return of_samples


def is_of_frames(reward: Any) -> bool:
    """Tell whether a reward, or what it is made of, is given a frame of a video at a time."""
    return bool(getattr(reward, "of_frames", not getattr(reward, "takes_videos", False)))


def pairs_over_frames(judge: Any) -> Callable[[torch.Tensor, torch.Tensor, Contexts], torch.Tensor]:
    """Make a judge's `win_rate` take pairs of videos too: the mean over pairs of frames, as `over_frames` does."""
    if getattr(judge, "takes_videos", False):
        return judge.win_rate

    def of_pairs(samples: torch.Tensor, others: torch.Tensor, contexts: Contexts) -> torch.Tensor:
        if samples.ndim != 5:
            return judge.win_rate(samples, others, contexts)
        return _mean([judge.win_rate(one, other, contexts) for one, other in zip(samples.unbind(1), others.unbind(1))])

    return of_pairs


def _mean(values: list[Any]) -> torch.Tensor:
    return torch.stack([torch.as_tensor(value) for value in values]).mean(0)
