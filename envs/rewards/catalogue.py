"""Rewards by name: `register_reward`, and `make_reward` for `--env.reward`."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from flowrl.envs.rewards.ranges import UNIT, guarded
from flowrl.errors import ConfigError, UnknownNameError
from flowrl.registry import own_module
from flowrl.types import RewardOutput

RewardFunction = Callable[[torch.Tensor, Sequence[Any]], Any]
"""`(samples (B, ...), B contexts) -> (B,)`, or a `RewardOutput` with named components."""


@dataclass(frozen=True)
class RewardEntry:
    """A registered reward.

    Attributes:
        name: Name for `--env.reward`.
        factory: Makes the reward; its keyword parameters are the reward's options.
        summary: One line for people.
    """

    name: str
    factory: Callable[..., RewardFunction]
    summary: str

    def options(self) -> dict[str, Any]:
        """List the options with their types."""
        hints = get_type_hints(self.factory.__init__ if inspect.isclass(self.factory) else self.factory)
        return {name: hints.get(name, str) for name in inspect.signature(self.factory).parameters}


REWARDS: dict[str, RewardEntry] = {}


def register_reward(name: str) -> Callable[[Any], Any]:
    """Decorate a reward: it becomes known to `--env.reward NAME`.

    On a class, the constructor's parameters (all with defaults, of type str, int, float, bool or Path) are its
    options: `--env.reward-options NAME.PARAMETER=VALUE`. On a function, the function itself is the reward.

    Attributes that a reward may have: `description` (one line for the head of a run), `scale` (a typical standard
    deviation, by which mixtures divide), `groupwise = True` (compares samples of the same context, so that a call must
    hold whole groups; an evaluation compares two flows by its method `win_rate(samples, others, contexts)`, where it
    has one), `takes` (the least and the greatest value of the images that it takes, (0.0, 1.0) as flows draw them:
    images of another range are refused), `pairwise = True` (called with images_a, images_b and prompts, gives the
    probability that a is better; its reward is the mean over the samples of the same context), `takes_videos = True`
    (called with videos (B, T, 3, H, W); other rewards get a frame at a time, and are means over the frames), `on_host =
    True` (computes on the host wherever samples are, without torch's global random numbers: it may be called in a
    thread while the next samples are drawn, by one thread at a time).
    """

    def register(reward: Any) -> Any:
        reward = guarded(reward, name)
        known = REWARDS.get(name)
        summary = (reward.__doc__ or "").strip().partition("\n")[0]
        factory: Any = reward if inspect.isclass(reward) else lambda: reward
        if known is not None and known.summary != summary:
            raise ConfigError(f"A reward '{name}' is registered already: {known.summary}")
        REWARDS[name] = RewardEntry(name, factory, summary)
        return reward

    return register


def reward_entry(name: str) -> RewardEntry:
    """Look up the entry of a registered name, or of `module:name` (the module registers it).

    Raises:
        UnknownNameError: No such name; names the closest, or says that the module has not registered it.
    """
    module, colon, own = name.rpartition(":")
    has = colon and hasattr(own_module(module, name), own)
    if has and own not in REWARDS and own.lower() not in REWARDS:
        raise UnknownNameError(
            f"'{name}' is there, and is no registered reward: put @flowrl.register_reward('{own}') above it."
        )
    if own not in REWARDS:
        raise UnknownNameError.of("reward", own, REWARDS)
    return REWARDS[own]


def make_reward(name: str, options: Mapping[str, str] | None = None) -> RewardFunction:
    """Make the reward of a registered name.

    Args:
        name: "aesthetic", or "module:name".
        options: Values of its options, as written on a command line.

    Raises:
        UnknownNameError: Unknown reward or option; names the closest.
        ConfigError: A value of the wrong type.
        ModelLoadError: Weights that the reward needs cannot be had.
    """
    entry = reward_entry(name)
    types = entry.options()
    values = {}
    for key, text in (options or {}).items():
        if key not in types:
            raise UnknownNameError.of(f"option of the reward '{entry.name}'", key, types)
        values[key] = _converted(text, types[key], f"{entry.name}.{key}")
    return entry.factory(**values)


def parse_options(texts: Sequence[str]) -> dict[str, dict[str, str]]:
    """Parse `("aesthetic.head=a.pth", "clip.model=b")` to `{"aesthetic": {"head": "a.pth"}, "clip": {"model": "b"}}`.

    Raises:
        ConfigError: Not of the form REWARD.OPTION=VALUE.
    """
    options: dict[str, dict[str, str]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        reward, dot, option = key.rpartition(".")
        if not (equals and dot and reward and option):
            raise ConfigError(
                f"A reward option is written REWARD.OPTION=VALUE, not '{text}'; e.g. aesthetic.head=FILE."
            )
        options.setdefault(reward, {})[option] = value
    return options


def check_options(options: Iterable[str], chosen: Collection[str]) -> None:
    """Raise `UnknownNameError` where options are given to a reward that is not chosen."""
    for name in sorted(set(options) - set(chosen)):
        if not chosen:
            raise UnknownNameError(f"There are options of the reward '{name}', and no reward is named that takes them.")
        raise UnknownNameError.of("reward to give options to", name, chosen)


def _converted(text: str, kind: Any, name: str) -> Any:
    """Convert `text` to the first type of an annotation (`int`, `str | None`, ...) that it can be read as."""
    kinds = [k for k in get_args(kind) or (kind,) if k is not type(None)]
    for k in (bool, int, float, Path, str):
        if k not in kinds:
            continue
        if k is bool:
            if text.lower() in ("true", "false"):
                return text.lower() == "true"
            continue
        try:
            return k(text)
        except ValueError:
            continue
    expected = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
    raise ConfigError(f"The reward option {name} must be {expected}, not '{text}'.")


class ModelReward(ABC):
    """Base of rewards that hold networks: they follow the samples to their device.

    A subclass keeps its frozen networks in `self.modules` and writes `reward`.
    """

    modules: Sequence[torch.nn.Module] = ()
    takes = UNIT
    _device: torch.device | None = None

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward images (B, 3, H, W) in [0, 1] with their prompts."""
        if images.device != self._device:
            for module in self.modules:
                module.to(images.device).requires_grad_(False)
            self._device = images.device
        return self.reward(images, prompts)

    @abstractmethod
    def reward(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward images (B, 3, H, W) with their prompts; the networks are where the images are."""
