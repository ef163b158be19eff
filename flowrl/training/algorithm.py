"""FlowAlgorithm: the loop that every algorithm shares, on stable-baselines3's BaseAlgorithm."""

from __future__ import annotations

import math
import sys
import time
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback

from flowrl.config import FlowConfig
from flowrl.distributed.ranks import Ranks, SharedGenerator, join
from flowrl.distributed.sharding import unsharded
from flowrl.envs.base import GenerationEnv, GenerationVecEnv, draw_contexts
from flowrl.errors import ConfigError, RewardError, UnknownNameError
from flowrl.functional import metrics
from flowrl.functional.flow import interpolate, sample_time
from flowrl.functional.losses import effective_sample_size, squared_error
from flowrl.models.lora import LoRA
from flowrl.training.buffer import RolloutBuffer
from flowrl.training.construction import (
    as_generation_env,
    check_device,
    check_groups,
    check_reward_errors,
    check_sharded,
    recommended_settings,
    weight_dtypes,
)
from flowrl.training.diagnosis import BadUpdates, check_updates
from flowrl.training.optimizers import make_optimizer, step_unless
from flowrl.training.policy import FlowPolicy
from flowrl.training.reward_calls import Scorer, stand_ins
from flowrl.types import Batch, Role


class FlowAlgorithm(BaseAlgorithm):
    """Collect samples, score them, update the velocity network, refresh the copies; repeat.

    A subclass declares its `Config` and what it needs, and writes `score` and `loss`.

    Args:
        policy: "FlowPolicy", or a subclass of it.
        env: Name of an environment, a `GenerationEnv`, or a `GenerationVecEnv`.
        config: Settings; None takes the defaults with what the environment recommends.
        seed: Seed of everything random here; the same seed on the same machine gives the same weights.
        device: "auto", "cpu", "cuda", "mps", ...
        verbose: 1 prints a table per logged iteration.
        tensorboard_log: Folder for TensorBoard.
        env_settings: Settings of a named environment.
        ranks: The processes that train together; None joins those that a launcher started.
        **settings: Single fields of `Config`.

    Raises:
        UnknownNameError: Unknown algorithm setting or environment; names the closest.
        ConfigError: Settings without meaning.
        DeviceError: The device is not there.
    """

    Config: ClassVar[type[FlowConfig]] = FlowConfig
    name: ClassVar[str] = ""
    unpredictable: ClassVar[str] = ""
    """Work whose memory a dry run cannot try, since it depends on the values of tensors."""
    policy_aliases: ClassVar[dict[str, Any]] = {"FlowPolicy": FlowPolicy}
    policy: FlowPolicy
    env: GenerationVecEnv

    def __init__(
        self,
        policy: str | type[FlowPolicy],
        env: str | GenerationEnv | GenerationVecEnv,
        *,
        config: FlowConfig | None = None,
        seed: int | None = None,
        device: torch.device | str = "auto",
        verbose: int = 0,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        env_settings: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
        _init_setup_model: bool = True,
        **settings: Any,
    ) -> None:
        check_device(device)
        self.ranks = join(device) if ranks is None else ranks
        core = as_generation_env(env, env_settings)
        self.config = self.configure(config, core.recommended, settings)
        self.config.check_ranks(self.ranks.world_size)
        chunk = self.config.rollout_batch_size or self.config.n_samples
        if core.groupwise:
            check_groups(self.config.group_size, chunk // self.ranks.world_size)
        if self.ranks.world_size > 1 and seed is None:
            seed = int(self.ranks.broadcast(str(torch.seed() % 2**31)))
        super().__init__(
            policy,
            GenerationVecEnv(core, chunk),
            learning_rate=self.config.learning_rate,
            policy_kwargs=policy_kwargs,
            tensorboard_log=tensorboard_log if self.ranks.is_main else None,
            verbose=verbose if self.ranks.is_main else 0,
            device=self.ranks.device or device,
            support_multi_env=True,
            seed=seed,
        )
        self.iteration = 0
        self.n_dropped = 0  # samples so far that the reward failed for
        self._rollout_metrics: dict[str, torch.Tensor] = {}
        self._warned: set[str] = set()
        if _init_setup_model:
            self._setup_model()
            if self.ranks.rank:
                torch.manual_seed(cast(int, self.seed) + self.ranks.rank)  # dropout is not drawn for all

    @classmethod
    def copies_for(cls, config: Any) -> set[Role]:
        """Copies of the network that these settings need; a subclass adds its own."""
        copies: set[Role] = {"reference"}
        if config.refresh_every > 1:
            copies.add("behaviour")
        if config.ema_decay > 0:
            copies.add("ema")
        return copies

    def objective(self, x_1: torch.Tensor, contexts: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
        """What `score` is given as reward (B,): the reward itself, or less what depends on the samples."""
        return reward

    def score(self, rollout: Batch) -> torch.Tensor:
        """What the update makes of the rewards: weights or advantages (B,), of all samples of an iteration.

        With several ranks `rollout.x_1` has this rank's samples only, the rest of `rollout` all of them: what needs
        the samples themselves belongs to `objective`.
        """
        return rollout.reward

    def observe(self, rollout: Batch) -> None:
        """Take the rewards of an iteration into running statistics, before `score`."""

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Tensors that a checkpoint must keep besides the policy's: running statistics, a critic."""
        return {}

    def load_extra_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what `extra_state` gave; by default in place."""
        for name, tensor in self.extra_state().items():
            tensor.copy_(tensors[name])

    def cautions(self, logged: Mapping[str, Any]) -> dict[str, str]:
        """What a user should be told of the figures of an iteration, by kind; each kind is told once."""
        return {}

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Scalar loss of a minibatch, and scalar metrics as tensors (never `.item()` here)."""

    @classmethod
    def configure(
        cls,
        config: FlowConfig | None = None,
        recommended: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> FlowConfig:
        """The config that a run uses: the given one, or the defaults with an environment's recommendations."""
        settings = settings or {}
        known = [f.name for f in fields(cls.Config)]
        for key in settings:
            if key not in known:
                raise UnknownNameError.of(f"setting of {cls.__name__}", key, known)
        if config is None:
            config = cls.Config(**{**recommended_settings(cls.name, known, recommended or {}), **settings})
        elif settings:
            config = replace(config, **settings)
        if type(config) is not cls.Config:
            raise ConfigError(f"{cls.__name__} takes a {cls.Config.__name__}, not a {type(config).__name__}.")
        return config

    def _setup_model(self) -> None:
        config, core = self.config, self.env.core
        self.shares = None if core.shares is None else torch.from_numpy(core.shares).float().to(self.device)
        if self.seed is not None:
            self.set_random_seed(self.seed)
        self.scorer = Scorer(core, config.on_reward_error, config.reward_retries, config.reward_timeout)
        core.gather_with(lambda rows: self.ranks.all_gather(rows, len(rows) * self.ranks.world_size))
        check_reward_errors(config.on_reward_error, config.reward_timeout, core, self.ranks.world_size)
        self.bad_updates = BadUpdates(self.device)
        self.generator = SharedGenerator(self.device, self.ranks)
        self.generator.manual_seed(torch.seed() if self.seed is None else self.seed)
        with self.ranks.main_first():
            flow = core.flow.load(*weight_dtypes(config))
        self.policy = cast(type[FlowPolicy], self.policy_class)(
            self.observation_space,
            self.action_space,
            model=flow,
            contexts=core.contexts,
            copies=self.copies_for(config),
            lora=LoRA.of(config),
            steps=config.rollout_steps,
            solver=config.solver,
            guidance_scale=config.guidance_scale,
            guidance=config.guidance,
            precision=getattr(torch, config.precision),
            gradient_checkpointing=config.gradient_checkpointing,
            compile=config.compile,
            device=self.device,
            seed=None if self.seed is None else self.seed + 1,
            **self.policy_kwargs,
        )
        self.lr_schedule = lambda progress_remaining: config.learning_rate
        self.policy.optimizer = make_optimizer(config, self.policy.parameters_of("current").values())
        if self.ranks.is_sharded:
            check_sharded(self.name, self.unpredictable, config.optimizer)
        copies = self.policy.networks.values()
        trained = self.ranks.prepare(self.policy.model.network, self.policy.optimizer, copies)
        self.policy.train_through(trained, self.ranks.is_sharded)
        shape = self.policy.model.latent_shape
        self.buffer = RolloutBuffer(
            config.n_samples, shape, self.device, config.path_steps(), config.half_buffer, self.ranks
        )

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> FlowAlgorithm:
        """Train on `total_timesteps` generated samples (rounded up to whole iterations).

        The other arguments are stable-baselines3's; `log_interval` counts iterations.
        """
        progress_bar &= self.ranks.is_main
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name or self.name, progress_bar
        )
        callback.on_training_start(locals(), globals())
        while self.num_timesteps < total_timesteps:
            started = time.perf_counter()
            if not self.collect(callback):
                break
            logged = self.update()
            check_updates(self)
            self.sync()
            self.iteration += 1
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            if self.iteration % log_interval == 0:
                self._log(logged, time.perf_counter() - started)
            callback.update_locals(locals())
            if self.ranks.any(not _iteration_ended(callback)):
                break
        callback.on_training_end()
        return self

    @property
    def rollout_reward(self) -> float | None:
        """Mean reward of the newest iteration's samples, where there is one and it is a number; synchronises."""
        reward = float(self._rollout_metrics.get("rollout/reward_mean", math.nan))
        return reward if math.isfinite(reward) else None

    @rollout_reward.setter
    def rollout_reward(self, reward: float | None) -> None:
        self._rollout_metrics = {} if reward is None else {"rollout/reward_mean": torch.tensor(float(reward))}

    @property
    def behaviour_role(self) -> Role:
        """The copy that draws the samples."""
        return "behaviour" if "behaviour" in self.policy.roles else "current"

    def draw_contexts(self) -> torch.Tensor:
        """Context indices (n_samples,) of an iteration, over all ranks: each drawn one repeated `group_size` times."""
        n = len(self.env.core.contexts)
        return draw_contexts(n, self.config.n_samples, self.config.group_size, self.generator, self.shares)

    def draw_latents(self, contexts: torch.Tensor) -> torch.Tensor:
        """Latents `x_1` (B, *latent_shape) of the behaviour policy for context indices (B,)."""
        return self.policy.sample_latents(contexts, role=self.behaviour_role, generator=self.generator)

    def minibatches(self) -> Iterator[Batch]:
        """One pass over what `loss` is given."""
        return self.buffer.minibatches(self.config.batch_size, self.generator)

    def collect(self, callback: BaseCallback) -> bool:
        """Fill the buffer with scored samples of the behaviour policy; False when a callback stops the run."""
        callback.on_rollout_start()
        self.policy.set_training_mode(False)
        self.buffer.reset()
        shown: list[tuple[torch.Tensor, torch.Tensor]] = []
        components: dict[str, list[torch.Tensor]] = {}
        dropped = 0
        for drawn in self.draw_contexts().split(self.env.num_envs):
            contexts = self.ranks.shard(drawn)
            x_1 = self.draw_latents(contexts)
            samples = self.policy.decode(x_1)
            output, kept = self.scorer(samples, contexts)
            if len(kept) < len(contexts):
                dropped += len(contexts) - len(kept)
                index = stand_ins(contexts, kept)
                if self.buffer.path_steps:
                    self.buffer.rearrange_path(index)
                x_1, samples, contexts, output = x_1[index], samples[index], contexts[index], output.at(kept, index)
            self.buffer.add(x_1, contexts, output.reward, self.objective(x_1, contexts, output.reward))
            for key, value in output.components.items():
                components.setdefault(key, []).append(value)
            if len(contexts) * len(shown) < metrics.DIVERSITY_SAMPLES:
                shown.append((samples, contexts))
            self.num_timesteps += len(drawn)
            callback.update_locals(locals())
            if self.ranks.any(not callback.on_step()):
                return False
        self._check_dropped(dropped)
        self.buffer.share()
        rollout = self.buffer.all()
        self.observe(rollout)
        self.buffer.weight.copy_(self.score(rollout._replace(reward=rollout.weight.clone())))
        self._rollout_metrics = self._measure(self.buffer.all(), self._diversity(shown), components)
        callback.on_rollout_end()
        return True

    def _check_dropped(self, dropped: int) -> None:
        """Count the samples left out, over all ranks; too many stop the run."""
        if self.config.on_reward_error != "drop":
            return
        total = int(self.ranks.all_reduce_(torch.tensor(dropped, device=self.device)).item())
        self.n_dropped += total
        if total > self.config.max_dropped * self.config.n_samples:
            raise RewardError(
                f"The reward failed for {total} of {self.config.n_samples} samples of an iteration, more than "
                f"max_dropped = {self.config.max_dropped:g} allows. The last error: {self.scorer.last_error}"
            )

    def update(self) -> dict[str, torch.Tensor]:
        """Gradient steps on the buffer; metrics are means over minibatches, still on the device."""
        config, policy = self.config, self.policy
        policy.set_training_mode(True)
        if config.offload:
            policy.model.offload()
        parameters = list(policy.parameters_of("current").values())
        is_last = config.accumulation - 1  # of the minibatches of a step; the ranks agree on its gradient there
        totals: dict[str, torch.Tensor] = {}
        norms: list[torch.Tensor] = []
        n_minibatches = n_pending = 0
        for _ in range(config.n_epochs):
            for batch in self.minibatches():
                with nullcontext() if n_pending == is_last else self.ranks.no_sync(policy.trained):
                    loss, parts = self.loss(batch)
                    (loss / config.accumulation).backward()
                n_minibatches, n_pending = n_minibatches + 1, n_pending + 1
                if n_pending == config.accumulation:
                    norms.append(self._step(parameters))
                    n_pending = 0
                for key, value in {"loss": loss, **parts}.items():
                    totals[key] = totals.get(key, 0) + value.detach()
        if n_pending:
            self.ranks.average_gradients(parameters)
            norms.append(self._step(parameters))
        means = {key: value / n_minibatches for key, value in totals.items()}
        means["grad_norm"] = torch.stack(norms).mean()
        return {"drift": self.drift(), **means} if "drift" not in means else means

    @torch.no_grad()
    def drift(self) -> torch.Tensor:
        """`E|v - v_ref|^2`, mean over dimensions, estimated on one minibatch; a scalar tensor."""
        batch = next(self.buffer.minibatches(self.config.batch_size, self.generator))
        t = sample_time(len(batch.x_1), self.config.time_sampling, self.generator)
        x_t, _ = interpolate(self.policy.noise(len(t), self.generator), batch.x_1, t)
        cond = self.policy.condition(batch.contexts)
        v, v_ref = (self.policy.velocity(x_t, t, cond, role) for role in ("current", "reference"))
        return squared_error(v, v_ref).mean()

    def _step(self, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        """One optimizer step; the gradient's norm before clipping."""
        optimizer = self.policy.optimizer
        rate = self.lr_schedule(self._current_progress_remaining)
        if self.config.warmup_updates:
            rate *= min(1.0, (self._n_updates + 1) / self.config.warmup_updates)
        for group in optimizer.param_groups:
            group["lr"] = rate
        norm = unsharded(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm))
        bad = (~norm.isfinite()).float()
        step_unless(bad, optimizer, self.ranks.is_sharded)
        self.bad_updates.note(bad)
        self.policy.weights_changed("current")
        optimizer.zero_grad(set_to_none=True)
        self._n_updates += 1
        if self.config.ema_decay > 0:  # the average of few steps forgets its start sooner
            decay = min(self.config.ema_decay, (1 + self._n_updates) / (10 + self._n_updates))
            self.policy.update_copy("ema", decay)
        return norm

    def sync(self) -> None:
        """Refresh the behaviour policy."""
        if (self.iteration + 1) % self.config.refresh_every == 0:
            self.policy.update_copy("behaviour")

    def _measure(
        self, rollout: Batch, diversity: torch.Tensor, components: dict[str, list[torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        reward = rollout.reward
        measured = {
            "rollout/reward_mean": reward.mean(),
            "rollout/reward_std": reward.std(correction=0),
            "rollout/reward_min": reward.min(),
            "rollout/reward_max": reward.max(),
            "rollout/diversity": diversity,
            "rollout/ess": effective_sample_size(rollout.weight) / len(reward),
        }
        if self.config.on_reward_error == "drop":
            measured["rollout/dropped"] = torch.tensor(float(self.n_dropped), device=reward.device)
        for key, values in components.items():
            measured[f"rollout/{key}"] = torch.cat(values).mean()
        return measured

    def _diversity(self, shown: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Of some samples of each rank, from pairs within the ranks: images are not sent; a scalar tensor."""
        samples, contexts = (torch.cat(parts)[: metrics.DIVERSITY_SAMPLES] for parts in zip(*shown))
        total, n_pairs = self.ranks.all_reduce_(metrics.pair_distances(samples, contexts))
        return total / n_pairs

    def _log(self, updates: dict[str, torch.Tensor], seconds: float) -> None:
        measured = {**self._rollout_metrics, **{f"train/{key}": value for key, value in updates.items()}}
        values = self.ranks.mean_(torch.stack([value.float() for value in measured.values()])).tolist()
        for key, value in zip(measured, values):
            self.logger.record(key, value)
        self.logger.record("train/learning_rate", self.policy.optimizer.param_groups[0]["lr"])
        self.logger.record("train/n_updates", self._n_updates)
        if self.bad_updates.total:
            self.logger.record("train/bad_updates", self.bad_updates.total)
        self.logger.record("time/iteration", self.iteration)
        self.logger.record("time/samples_per_second", self.config.n_samples / max(seconds, sys.float_info.epsilon))
        self.logger.record("time/network_evaluations", self.policy.evaluations * self.ranks.world_size)
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.last_logged = dict(self.logger.name_to_value)
        for kind, text in self.cautions(self.last_logged).items():
            if kind not in self._warned and self.ranks.is_main:
                self._warned.add(kind)
                warnings.warn(text, stacklevel=3)
        self.logger.dump(step=self.num_timesteps)

    def save(self, path: str | Path, exclude: Any = None, include: Any = None) -> None:  # type: ignore[override]
        """Write a checkpoint folder: everything that training needs to go on exactly; see `flowrl.training.saving`.

        `exclude` and `include` are stable-baselines3's and have no meaning here.
        """
        from flowrl.training.saving import save_checkpoint

        save_checkpoint(self, path)

    @classmethod
    def load(  # type: ignore[override]
        cls,
        path: str | Path,
        env: str | GenerationEnv | GenerationVecEnv | None = None,
        device: torch.device | str = "auto",
        **kwargs: Any,
    ) -> FlowAlgorithm:
        """Algorithm from a checkpoint folder, or from a run folder (its newest state).

        Args:
            path: What `save` wrote.
            env: Needed when the algorithm was made with an environment object instead of a name.
            device: As in the constructor.
            **kwargs: `verbose`, `tensorboard_log`.

        Raises:
            CheckpointError: Damaged, incomplete, or of another algorithm.
        """
        from flowrl.training.loading import load_checkpoint

        return load_checkpoint(cls, path, env=env, device=device, **kwargs)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []


def _iteration_ended(callback: BaseCallback) -> bool:
    """Tell callbacks that have an `on_iteration_end` method; False when one of them stops the run.

    stable-baselines3's `on_step` comes in the middle of an iteration; only here can the state be saved whole.
    """
    children = getattr(callback, "callbacks", None)
    if children is not None:
        return all([_iteration_ended(child) for child in children])
    hook = getattr(callback, "on_iteration_end", None)
    return hook is None or hook() is not False
