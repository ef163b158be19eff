"""SB3Algorithm: stable-baselines3's BaseAlgorithm with folders in place of pickles."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    EvalCallback,
    EventCallback,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.type_aliases import MaybeCallback

from flowrl.checks import counted
from flowrl.distributed.ranks import Ranks
from flowrl.envs.base import GenerationEnv, GenerationVecEnv
from flowrl.errors import CheckpointError, ConfigError, UnknownNameError
from flowrl.training.construction import as_generation_env, check_trainable
from flowrl.training.diagnosis import BadUpdates
from flowrl.training.optimizers import laid_out_like, scheduled_rate
from flowrl.training.records import log_iteration
from flowrl.training.signal import Signal

if TYPE_CHECKING:
    from flowrl.training.algorithm import FlowAlgorithm


def for_callbacks(known: dict[str, Any]) -> dict[str, Any]:
    """Give the variables of `learn` that callbacks see: all but themselves, or they and the model are never let go."""
    return {name: value for name, value in known.items() if not isinstance(value, BaseCallback)}


class SB3Algorithm(BaseAlgorithm):
    """An algorithm of stable-baselines3 that saves and loads checkpoint folders."""

    rollout_figures: dict[str, torch.Tensor]
    last_logged: dict[str, Any]
    warned: set[str]
    misfit: bool
    policy: Any
    config: Any
    generator: torch.Generator
    ranks: Ranks
    bad_updates: BadUpdates
    name: ClassVar[str]
    unlogged: tuple[dict[str, torch.Tensor], float] | None = None
    """Figures of the newest iteration's updates and its seconds, while they are in no log."""
    is_aimed = False
    """Whether the coefficient is set by `target_lambda` and the rewards of this environment."""

    def lr_schedule(self, remaining: float) -> float:
        """Compute the learning rate that the settings say, `remaining` (1 to 0) of the run being still to come."""
        return scheduled_rate(self.config, remaining)

    @property
    def learning_rate(self) -> float:
        """The setting of that name; whoever sets it, a callback say, changes the settings."""
        return self.config.learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        self.config = replace(self.config, learning_rate=rate)

    @property
    def rollout_reward(self) -> float | None:
        """Mean reward of the newest iteration's samples, where there is one and it is a number; synchronises."""
        reward = float(self.rollout_figures.get("rollout/reward_mean", math.nan))
        return reward if math.isfinite(reward) else None

    def save(self, path: str | Path, exclude: Any = None, include: Any = None) -> None:  # type: ignore[override]
        """Write a checkpoint folder: everything that training needs to go on exactly; see `flowrl.training.saving`.

        `exclude` and `include` are stable-baselines3's and have no meaning here.
        """
        from flowrl.training.saving import save_checkpoint

        save_checkpoint(cast(Any, self), path)

    @classmethod
    def load(  # type: ignore[override]
        cls,
        path: str | Path,
        env: str | GenerationEnv | GenerationVecEnv | None = None,
        device: torch.device | str = "auto",
        **kwargs: Any,
    ) -> FlowAlgorithm:
        """Make an algorithm from a checkpoint folder, or from a run folder (its newest state).

        Args:
            path: What `save` wrote.
            env: Needed when the algorithm was made with an environment object instead of a name. In another one what
                it keeps of rewards and prompts begins anew: statistics, critics, reference samples.
            device: As in the constructor.
            **kwargs: `verbose`, `tensorboard_log`; `policy` and `policy_kwargs` where it had a policy of one's own;
                settings to train on with in place of its own, such as `learning_rate=1e-4`.

        Raises:
            CheckpointError: Damaged, incomplete, or of another algorithm or policy.
            ConfigError: Settings that cannot be used, or that are the checkpoint's own.
        """
        from flowrl.training.loading import load_checkpoint, of_newest

        given = [name for name in kwargs if name not in ("verbose", "tensorboard_log", "policy", "policy_kwargs")]
        own = {"env": env, "device": device, **kwargs}
        try:
            return of_newest(path, lambda folder: load_checkpoint(cast(Any, cls), folder, **own))
        except CheckpointError as error:
            if given:  # they may ask for what it does not hold
                error.args = (f"{error} Settings given in place of its own: {', '.join(given)}.",)
            raise

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Refuse another environment: rewards, prompts and settings of training hang on the one it was made with.

        Raises:
            ConfigError: It is another one; says how to train on.
        """
        if as_generation_env(env) is not self.env.core:  # type: ignore[union-attr]
            raise ConfigError(
                "The environment of an algorithm cannot be replaced: its prompts are encoded and its reward is asked "
                f"where training began. To train on with another: model.save('folder'), then "
                f"{type(self).__name__}.load('folder', env=...)."
            )

    def set_parameters(self, load_path_or_dict: Any, exact_match: bool = True, device: Any = "auto") -> None:
        """Take weights and moments that `get_parameters` gave.

        Raises:
            ConfigError: They come from a file, or do not fit.
        """
        if not isinstance(load_path_or_dict, dict):
            raise ConfigError(
                "set_parameters takes what get_parameters gives. Checkpoints are folders: "
                f"{type(self).__name__}.load('folder')."
            )
        if self.ranks.is_sharded:
            raise ConfigError("With FSDP every process has a part of the weights: set_parameters cannot divide them.")
        try:
            super().set_parameters(load_path_or_dict, exact_match, device)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ConfigError(f"These parameters do not fit the policy: {error}") from error
        state = self.policy.optimizer.state
        for parameter, moments in state.items():
            moments.update({k: laid_out_like(v, parameter) for k, v in moments.items() if torch.is_tensor(v)})

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed everything random: also the noise of training and of the policy, once they are there."""
        super().set_random_seed(seed)
        if seed is not None and getattr(self, "policy", None) is not None:
            self.seed = seed
            self.generator.manual_seed(seed)
            self.policy.generator.manual_seed(seed + 1)

    def dump_logs(self) -> None:
        """Log the newest iteration, where that has not been done yet."""
        if self.unlogged is not None:
            log_iteration(cast(Any, self), *self.unlogged)
            self.unlogged = None

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        check_trainable(self.policy)
        self.signal.began = self._n_updates, self.bad_updates.zeros
        shown, name = progress_bar and self.ranks.is_main, tb_log_name or self.name
        total = counted("total_timesteps", total_timesteps, 0)
        return super()._setup_learn(total, callback, reset_num_timesteps, name, shown)

    def _get_policy_from_name(self, policy_name: str) -> Any:
        if policy_name not in self.policy_aliases:
            raise UnknownNameError.of("policy", policy_name, self.policy_aliases)
        return self.policy_aliases[policy_name]

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        for one in callback if isinstance(callback, list) else [callback]:
            if not (one is None or callable(one) or isinstance(one, BaseCallback)):
                raise ConfigError(
                    f"A callback is a BaseCallback of stable-baselines3, a function or a list of them, not {one!r}."
                )
        ready = super()._init_callback(callback, progress_bar)
        check_callback(ready)
        return ready

    @cached_property
    def signal(self) -> Signal:
        """Record of what rewards have told training so far."""
        return Signal()

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []


def check_callback(callback: BaseCallback | None) -> None:
    """Check that callbacks which only act inside an EvalCallback are in one.

    Raises:
        ConfigError: One is not; says how to give it.
    """
    if isinstance(callback, StopTrainingOnRewardThreshold | StopTrainingOnNoModelImprovement):
        place = "callback_on_new_best" if isinstance(callback, StopTrainingOnRewardThreshold) else "callback_after_eval"
        name = type(callback).__name__
        raise ConfigError(
            f"{name} stops by the rewards of evaluations and belongs into an EvalCallback: "
            f"EvalCallback(env, {place}={name}(...))."
        )
    if isinstance(callback, CallbackList):
        for child in callback.callbacks:
            check_callback(child)
    elif isinstance(callback, EventCallback) and not isinstance(callback, EvalCallback):
        check_callback(callback.callback)
