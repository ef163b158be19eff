"""Rewards that compare samples of the same context: shares of wins, and pairwise preference models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from flowrl.envs.base import check_reward
from flowrl.envs.prompts import picture_of
from flowrl.envs.rewards.catalogue import RewardFunction
from flowrl.envs.rewards.frames import is_of_frames, over_frames
from flowrl.errors import ConfigError, RewardError
from flowrl.functional.metrics import wins
from flowrl.types import Contexts, RewardOutput


def groups_of(contexts: Contexts, name: str) -> list[torch.Tensor]:
    """Find the indices of the samples of each distinct context, int64 on the CPU, in the order of their first samples.

    The same text with another picture is another context.

    Raises:
        ConfigError: A context with a single sample; names the reward and the remedy.
    """
    rows: dict[tuple[Any, str | None], list[int]] = {}
    for i, context in enumerate(contexts):
        rows.setdefault((context, picture_of(context)), []).append(i)
    for (context, _), members in rows.items():
        if len(members) == 1:
            raise ConfigError(
                f"The reward '{name}' compares samples of the same context, but got a single one of {context!r}. In "
                "training set group_size to 2 or more; in evaluation take a multiple of 8 samples."
            )
    return [torch.tensor(members) for members in rows.values()]


class WinRateReward:
    """Share of the other samples of the same context in the call that a sample beats; ties count half.

    In [0, 1], of mean 1/2 in every group. Components: the reward's own value under its name, and its own components.
    Videos are compared by their own values, which are means over the frames where the reward is of images.

    Args:
        reward: Reward to compare by.
        name: Its name.
    """

    groupwise = takes_videos = True

    def __init__(self, reward: RewardFunction, name: str) -> None:
        self.reward, self.name = reward, name
        self.on_host = getattr(reward, "on_host", False)
        self.of_frames, self.takes_sounds = is_of_frames(reward), getattr(reward, "takes_sounds", False)
        self.description = f"share of the samples of the same prompt that are beaten in {name}"

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward images (B, 3, H, W) in [0, 1].

        Raises:
            ConfigError: A prompt with a single image.
        """
        groups = groups_of(prompts, f"winrate({self.name})")
        raw, components = raw_values(self.reward, images, prompts, self.name)
        values, beaten = raw.cpu(), torch.empty(len(images))
        for rows in groups:
            points = wins(values[rows][:, None], values[rows][None])
            beaten[rows] = (points.sum(1) - 0.5) / (len(rows) - 1)  # less the tie with itself
        return RewardOutput(beaten, components)

    def win_rate(self, images: torch.Tensor, others: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Compute 1 where an image beats the other (B, 3, H, W) of its prompt, 1/2 where they tie: (B,)."""
        one, other = (raw_values(self.reward, given, prompts, self.name)[0] for given in (images, others))
        return wins(one, other)


class PairwiseReward:
    """Mean probability, under a pairwise preference model, to be preferred to the other samples of the same context.

    Every pair of a context is asked in both orders, since judges favour a place: n (n - 1) questions for n samples,
    those of a context in one call.

    Args:
        preference: `(images_a (P, 3, H, W), images_b (P, 3, H, W), P prompts) -> (P,)`: probability that a is better.
        name: Its name.
    """

    groupwise = True

    def __init__(self, preference: Callable[..., Any], name: str) -> None:
        self.preference, self.name = preference, name
        self.takes_videos, self.takes_sounds = (getattr(preference, f"takes_{k}", False) for k in ("videos", "sounds"))
        self.description = f"mean probability to be preferred within the samples of the same prompt, by {name}"

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward images (B, 3, H, W) in [0, 1].

        Raises:
            ConfigError: A prompt with a single image.
            RewardError: The model gives something other than a probability per pair.
        """
        reward = torch.empty(len(images))
        for rows in groups_of(prompts, self.name):
            n = len(rows)
            one, other = (index.flatten() for index in torch.meshgrid(rows, rows, indexing="ij"))
            differ = one != other
            one, other = one[differ], other[differ]
            probability = self._asked(images[one], images[other], [prompts[i] for i in one.tolist()])
            preferred = torch.zeros(n, n)
            preferred[~torch.eye(n, dtype=torch.bool)] = probability  # [i, j]: i, shown first, is better than j
            reward[rows] = (preferred.sum(1) + (n - 1) - preferred.sum(0)) / (2 * (n - 1))
        return RewardOutput(reward)

    def win_rate(self, images: torch.Tensor, others: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Compute the probability (B,) that an image is preferred to the other (B, 3, H, W), asked in both orders.

        Raises:
            RewardError: The model gives something other than a probability per pair.
        """
        return (self._asked(images, others, prompts) + 1 - self._asked(others, images, prompts)) / 2

    def _asked(self, one: torch.Tensor, other: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        given = self.preference(one, other, prompts)
        probability = check_reward(given, one, prompts, self.name).cpu()
        if bool((probability < 0).any() | (probability > 1).any()):
            raise RewardError(
                f"The pairwise reward '{self.name}' must give probabilities in [0, 1], not values from "
                f"{probability.min():.3g} to {probability.max():.3g}."
            )
        return probability


def raw_values(
    reward: RewardFunction, images: torch.Tensor, prompts: Sequence[str], name: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute checked values (B,) of a reward and its components, named `name` and `name.component`.

    Of videos they are means over the frames, unless the reward takes whole ones.

    Raises:
        RewardError: Not one finite number per sample.
    """

    def of_a_copy(given: torch.Tensor, contexts: Contexts) -> Any:
        return reward(given.clone(), contexts)  # it may change them, and others come after it

    takes_whole = getattr(reward, "takes_videos", False)
    output = (of_a_copy if takes_whole else over_frames(of_a_copy))(images, prompts)
    output = output if isinstance(output, RewardOutput) else RewardOutput(output)
    value = check_reward(output.reward, images, prompts, name)
    return value, {name: value, **{f"{name}.{key}": part for key, part in output.components.items()}}
