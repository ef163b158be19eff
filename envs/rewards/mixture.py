"""Weighted sums of rewards: the meaning of `--env.reward "clip:0.5+aesthetic:0.5"`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from flowrl.envs.rewards.catalogue import RewardFunction, check_options, make_reward, parse_options
from flowrl.envs.rewards.frames import is_of_frames
from flowrl.envs.rewards.groups import PairwiseReward, WinRateReward, groups_of, raw_values
from flowrl.errors import ConfigError
from flowrl.types import RewardOutput

Normalisation = Literal["fixed", "running", "group"]
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)")
WIN_RATE = re.compile(r"winrate\((.*)\)")
SYNTAX = (
    "A mixture is written PART+PART+..., a part NAME[:WEIGHT[:NORMALISATION]] with NAME a reward, module:name or "
    f"winrate(NAME), WEIGHT a decimal number and NORMALISATION {', '.join(get_args(Normalisation))}; "
    "e.g. clip:0.7+aesthetic:0.3:running."
)


@dataclass(frozen=True)
class PartSpec:
    """A part of a mixture as it was written.

    Attributes:
        name: Name of the reward, without `winrate(...)`.
        win_rate: Whether shares of wins take the place of its values.
        weight: None where none was written.
        normalisation: Normalisation of its values.
    """

    name: str
    win_rate: bool = False
    weight: float | None = None
    normalisation: Normalisation = "fixed"

    @property
    def label(self) -> str:
        """Name of its component: without the module."""
        name = self.name.rpartition(":")[2]
        return f"winrate({name})" if self.win_rate else name


def parse_mixture(text: str) -> list[PartSpec]:
    """Parse the parts of an `--env.reward`. The first field of a part that is a number is its weight.

    Raises:
        ConfigError: Not of that form, or a reward twice.
    """
    parts = [_parse_part(part, text) for part in text.split("+")]
    labels = [part.label for part in parts]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"The mixture '{text}' has the reward '{label}' more than once.")
    return parts


def modules_of(text: str) -> list[str]:
    """Name the modules of one's own that the rewards of an `--env.reward` come from; none of what is no such text."""
    try:
        return [part.name.rpartition(":")[0] for part in parse_mixture(text) if ":" in part.name]
    except ConfigError:
        return []


def _parse_part(part: str, text: str) -> PartSpec:
    fields = part.split(":")
    place = next((i for i, word in enumerate(fields) if NUMBER.fullmatch(word)), len(fields))
    name, rest = ":".join(fields[:place]), fields[place:]
    normalisation = rest[1] if len(rest) > 1 else "fixed"
    misplaced = not rest and len(fields) > 1 and fields[-1] in get_args(Normalisation)
    if not name or len(rest) > 2 or normalisation not in get_args(Normalisation) or misplaced:
        raise ConfigError(f"Cannot read '{part}' in the reward '{text}'. {SYNTAX}")
    inner = WIN_RATE.fullmatch(name)
    bare = inner[1] if inner else name
    if not bare or {"(", ")"} & set(bare):
        raise ConfigError(f"Cannot read '{part}' in the reward '{text}'. {SYNTAX}")
    return PartSpec(bare, inner is not None, float(rest[0]) if rest else None, normalisation)  # type: ignore[arg-type]


def make_mixture(text: str, options: Mapping[str, Mapping[str, str]] | None = None) -> RewardFunction:
    """Make the reward of an `--env.reward`: a mixture, or for a single name without weight the reward itself.

    Args:
        text: "clip", "clip:0.7+aesthetic:0.3:running", "winrate(clip)", ...
        options: Options by the name of the reward they are for, see `parse_options`.

    Raises:
        ConfigError: Not of that form, or an option of the wrong type.
        UnknownNameError: Unknown reward or option, or options for a reward that is no part.
        ModelLoadError: Weights that a reward needs cannot be had.
    """
    options = options or {}
    specs = parse_mixture(text)
    names = list(dict.fromkeys(spec.name for spec in specs))
    check_options(options, names)
    rewards = {name: _made(name, options.get(name)) for name in names}
    parts = [
        Part(
            spec.label,
            WinRateReward(rewards[spec.name], spec.name.rpartition(":")[2]) if spec.win_rate else rewards[spec.name],
            1.0 if spec.weight is None else spec.weight,
            spec.normalisation,
        )
        for spec in specs
    ]
    if len(specs) == 1 and specs[0].weight is None:
        return parts[0].reward
    return MixtureReward(parts)


def _made(name: str, options: Mapping[str, str] | None) -> RewardFunction:
    reward = make_reward(name, options)
    return PairwiseReward(reward, name.rpartition(":")[2]) if getattr(reward, "pairwise", False) else reward


@dataclass
class RunningStatistics:
    """Mean and variance of all numbers seen so far (Chan, Golub and LeVeque 1983, eq. 2.1), in float64 on the CPU."""

    state: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    """Count, mean, sum of squared deviations."""

    def update(self, values: torch.Tensor) -> None:
        """Take in values (B,)."""
        n, mean, squares = self.state
        m = len(values)
        gap = values.mean() - mean
        squares = squares + (values - values.mean()).square().sum() + gap.square() * n * m / (n + m)
        self.state = torch.stack([n + m, mean + gap * m / (n + m), squares])

    def standard_score(self, values: torch.Tensor) -> torch.Tensor:
        """Compute `(values - mean) / standard deviation`; 0 where all that was seen is equal to the mean."""
        n, mean, squares = self.state
        return _divided(values - mean, (squares / n).sqrt())


def _divided(deviation: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Divide deviations by their standard deviation, which in float64 is exactly 0 for equal float32 values."""
    return deviation / torch.where(spread > 0, spread, 1.0)


@dataclass(frozen=True)
class Part:
    """A reward in a mixture; the attributes as in `PartSpec`."""

    label: str
    reward: RewardFunction
    weight: float = 1.0
    normalisation: Normalisation = "fixed"

    @property
    def scale(self) -> float:
        """The reward's own typical standard deviation, 1 when it names none."""
        return float(getattr(self.reward, "scale", 1.0))


class MixtureReward:
    """Weighted sum of rewards, each normalised. Weights may be negative.

    - "fixed": divided by the reward's own `scale`.
    - "running": standard score by the mean and standard deviation of all its values in training so far, those of the
      call included. Only `observe`, which training calls, takes values in; before that it is as "fixed".
    - "group": standard score within the samples of the same context in the call.

    For gradients by the samples, means and standard deviations are numbers: a reward pulls as it would by itself.
    A video has one value of each part, the mean over its frames where a part is of images, and that is normalised.

    Components: the raw value of each part under its name, and its own components as `part.component`.

    Args:
        parts: Rewards, weights and normalisations.

    Raises:
        ConfigError: A reward whose `scale` is not a positive number.
    """

    takes_videos = True

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        for part in self.parts:
            if not (math.isfinite(part.scale) and part.scale > 0):
                raise ConfigError(f"The scale of the reward '{part.label}' must be positive, not {part.scale}.")
        self.groupwise = any(p.normalisation == "group" or getattr(p.reward, "groupwise", False) for p in self.parts)
        self.all_gather: Callable[[torch.Tensor], torch.Tensor] = lambda values: values
        self.running = {p.label: RunningStatistics() for p in self.parts if p.normalisation == "running"}
        self.description = " + ".join(
            f"{p.weight:g} {p.label}" + (f" / {p.scale:g}" if p.normalisation == "fixed" else f" ({p.normalisation})")
            for p in self.parts
        )

    @property
    def on_host(self) -> bool:
        """Whether all parts compute on the host."""
        return all(getattr(part.reward, "on_host", False) for part in self.parts)

    @property
    def takes_sounds(self) -> bool:
        """Whether all parts are of sounds."""
        return all(getattr(part.reward, "takes_sounds", False) for part in self.parts)

    @property
    def of_frames(self) -> bool:
        """Whether a part is given a frame of a video at a time."""
        return any(is_of_frames(part.reward) for part in self.parts)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each part by the name of its component."""
        return {part.label: part.weight for part in self.parts}

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward images (B, 3, H, W) in [0, 1], with the running statistics as they are.

        Raises:
            RewardError: A part is not one finite number per sample.
            ConfigError: A part that needs groups, and a prompt with a single image; or some parts have a gradient by
                the images and others have none, where one is asked for.
        """
        return self._mixed(images, prompts, observe=False)

    def observe(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward samples of training: the running statistics take them in first."""
        return self._mixed(images, prompts, observe=True)

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Give running statistics (3,) float64 by the name of the part; a checkpoint writes into them."""
        return {label: statistics.state for label, statistics in self.running.items()}

    def _mixed(self, images: torch.Tensor, prompts: Sequence[str], observe: bool) -> RewardOutput:
        total = torch.zeros(len(images), dtype=torch.float64)
        components: dict[str, torch.Tensor] = {}
        followed: list[str] = []
        ignored: list[str] = []
        for part in self.parts:
            raw, own = raw_values(part.reward, images, prompts, part.label)
            components |= own
            values = raw.cpu().double()
            if observe and part.label in self.running:
                self.running[part.label].update(self.all_gather(raw.detach()).cpu().double())
            total += part.weight * self._normalised(part, values, prompts)
            if part.weight:
                (followed if raw.requires_grad else ignored).append(part.label)
        if images.requires_grad and followed and ignored:
            raise ConfigError(
                f"The gradient of this mixture is that of {', '.join(followed)} alone: {', '.join(ignored)} gives "
                "none. Leave out what gives none, or take an algorithm that needs values only (docs/choosing.md)."
            )
        return RewardOutput(total.float(), components)

    def _normalised(self, part: Part, values: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        if part.normalisation == "group":
            score = torch.empty_like(values)
            for rows in groups_of(prompts, f"{part.label}:{part.weight:g}:group"):
                deviation = values[rows] - values[rows].detach().mean()
                score[rows] = _divided(deviation, deviation.detach().square().mean().sqrt())
            return score
        if part.normalisation == "running" and self.running[part.label].state[0] > 0:
            return self.running[part.label].standard_score(values)
        return values / part.scale


def make_rewards(names: Sequence[str], options: Sequence[str]) -> dict[str, RewardFunction]:
    """Make several rewards by name, each as `--env.reward` takes it, with options as on a command line.

    Raises:
        UnknownNameError: Unknown reward, or options of none of them.
    """
    given = parse_options(options)
    parts = {name: {part.name for part in parse_mixture(name)} for name in names}
    check_options(given, set().union(*parts.values()))
    return {name: make_mixture(name, {r: given[r] for r in own & given.keys()}) for name, own in parts.items()}
