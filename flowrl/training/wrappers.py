"""Wrappers around an environment: those that change what training sees are refused, since training goes past them."""

from __future__ import annotations

from typing import Any

import gymnasium
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from flowrl.errors import ConfigError

OBSERVERS = {
    *("OrderEnforcing", "PassiveEnvChecker", "RecordEpisodeStatistics", "TimeLimit", "Autoreset"),
    *("RecordVideo", "HumanRendering", "RenderCollection", "AddWhiteNoise", "ObstructView"),
}
"""Wrappers of Gymnasium that change no reward, observation or action: they watch, draw, or end episodes."""
VECTOR_OBSERVERS = ("VecMonitor", "VecCheckNan", "VecVideoRecorder")
"""The same of stable-baselines3, around batches."""
CHANGING = (
    *("step", "reset", "reward", "observation", "action", "evaluate", "observe"),
    *("step_async", "step_wait"),
)
"""Methods by which a wrapper changes what an environment takes and gives."""


def unwrapped(env: Any) -> Any:
    """Take off wrappers that only watch.

    Raises:
        ConfigError: One changes rewards, observations or actions; names it.
    """
    while isinstance(env, gymnasium.Wrapper | VecEnvWrapper):
        changed = sorted({name for cls in _own_classes(type(env)) for name in vars(cls) if name in CHANGING})
        if changed:
            raise ConfigError(
                f"The wrapper {type(env).__name__} changes what the environment takes or gives ({', '.join(changed)}), "
                "and training asks the environment itself for the reward of whole batches: the wrapper would be passed "
                "over. Write the change into the reward (docs/how-to/reward.md) and give the environment without it."
            )
        env = env.venv if isinstance(env, VecEnvWrapper) else env.env
    return env


def _own_classes(cls: type) -> list[type]:
    """List the classes of a wrapper that are not known to change nothing."""
    return [
        parent
        for parent in cls.__mro__
        if issubclass(parent, gymnasium.Wrapper | VecEnvWrapper | VecEnv) and not _watches(parent)
    ]


def _watches(cls: type) -> bool:
    if cls in (gymnasium.Wrapper, VecEnvWrapper, VecEnv, Monitor):
        return True
    package = cls.__module__.partition(".")[0]
    return (package == "gymnasium" and cls.__name__ in OBSERVERS) or (
        package == "stable_baselines3" and cls.__name__ in VECTOR_OBSERVERS
    )
