"""Environments as Gymnasium's vector environments: what `gymnasium.make_vec("flowrl/...")` makes."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.utils import seeding
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from flowrl.envs.base import GenerationEnv
from flowrl.errors import ConfigError


class GenerationVectorEnv(VectorEnv):
    """`num_envs` copies of a `GenerationEnv`, scored in one batch.

    Every episode is one step, so each step ends all and draws the next contexts at once (autoreset mode SAME_STEP).
    With Gymnasium's own default, which resets in a step of its own, every second action would be lost.

    Args:
        env: The environment.
        num_envs: Number of copies.
    """

    def __init__(self, env: GenerationEnv, num_envs: int) -> None:
        if num_envs < 1:
            raise ConfigError(f"num_envs must be positive, not {num_envs}.")
        self.core, self.num_envs = env, num_envs
        self.render_mode = env.render_mode
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.observation_space = batch_space(env.observation_space, num_envs)
        self.action_space = batch_space(env.action_space, num_envs)
        mode = getattr(gymnasium.vector, "AutoresetMode", None)  # since Gymnasium 1.1
        self.metadata = {**env.metadata, **({} if mode is None else {"autoreset_mode": mode.SAME_STEP})}
        self._rngs = [seeding.np_random()[0] for _ in range(num_envs)]
        self._contexts = np.zeros(num_envs, dtype=np.int64)
        self._samples = np.zeros((num_envs, *env.sample_shape), dtype=np.float32)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw a context for every copy; `options={"context": i}` asks for one.

        Args:
            seed: Seed of the first copy, one more for each further one; or a seed for each.
            options: Options of the environment's `reset`.
        """
        seeds = [int(seed) + i for i in range(self.num_envs)] if isinstance(seed, int | np.integer) else seed
        if seeds is not None and len(seeds) != self.num_envs:
            raise ConfigError(f"{len(seeds)} seeds were given for {self.num_envs} environments: give one for each.")
        for i, own in enumerate(seeds or []):
            if own is not None:
                self._rngs[i] = seeding.np_random(own)[0]
        asked = self.core.asked_in(options)
        self._contexts = self._drawn() if asked is None else np.full(self.num_envs, asked, dtype=np.int64)
        return self._contexts.copy(), self._described()

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Score the actions (num_envs, *sample_shape) as samples of the current contexts, and draw the next ones.

        Observations are the next contexts; `final_obs` and `final_info` are of the episodes that ended.
        """
        self._samples = np.array(actions, dtype=np.float32)  # a copy: `render` shows it later
        if len(self._samples) != self.num_envs:
            raise ConfigError(f"{len(self._samples)} actions were given for {self.num_envs} environments.")
        output = self.core.evaluate(torch.from_numpy(self._samples), torch.from_numpy(self._contexts)).detached()
        ended: dict[str, Any] = {}
        for i, context in enumerate(self._contexts):
            own = {key: values[i].item() for key, values in output.components.items()}
            own["context"] = self.core.contexts[context]
            ended = self._add_info(ended, {"final_obs": context, "final_info": own}, i)
        self._contexts = self._drawn()
        rewards = output.reward.numpy().astype(np.float64)
        all_of_them = np.ones(self.num_envs, dtype=bool)
        return self._contexts.copy(), rewards, all_of_them, ~all_of_them, {**ended, **self._described()}

    def render(self) -> tuple[Any, ...] | None:
        """Render the last sample of each copy."""
        if self.render_mode is None:
            return None
        frames = []
        for sample in self._samples:
            self.core._last = sample
            frames.append(self.core.render())
        return tuple(frames)

    def _drawn(self) -> np.ndarray:
        return np.array([self.core.draw(rng) for rng in self._rngs], dtype=np.int64)

    def _described(self) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for i, context in enumerate(self._contexts):
            infos = self._add_info(infos, {"context": self.core.contexts[context]}, i)
        return infos

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environment."""
        self.core.close()
