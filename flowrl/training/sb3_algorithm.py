"""SB3Algorithm: stable-baselines3's BaseAlgorithm with folders in place of pickles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from flowrl.envs.base import GenerationEnv, GenerationVecEnv

if TYPE_CHECKING:
    from flowrl.training.algorithm import FlowAlgorithm


class SB3Algorithm(BaseAlgorithm):
    """An algorithm of stable-baselines3 that saves and loads checkpoint folders."""

    rollout_figures: dict[str, torch.Tensor]
    last_logged: dict[str, Any]
    warned: set[str]

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
            env: Needed when the algorithm was made with an environment object instead of a name.
            device: As in the constructor.
            **kwargs: `verbose`, `tensorboard_log`.

        Raises:
            CheckpointError: Damaged, incomplete, or of another algorithm.
        """
        from flowrl.training.loading import load_checkpoint

        return load_checkpoint(cast(Any, cls), path, env=env, device=device, **kwargs)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []
