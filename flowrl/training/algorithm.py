"""FlowAlgorithm: the loop that every algorithm shares, on stable-baselines3's BaseAlgorithm.

`contexts -> draw -> reward -> weigh -> update -> refresh`; a subclass replaces one or two of them (see `Method`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import chain
from typing import Any, ClassVar, cast

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback

from flowrl.checks import counted
from flowrl.config import FlowConfig
from flowrl.distributed.ranks import Ranks, SharedGenerator, join
from flowrl.envs.base import GenerationEnv, GenerationVecEnv
from flowrl.training import construction
from flowrl.training.buffer import RolloutBuffer
from flowrl.training.diagnosis import BadUpdates, check_updates
from flowrl.training.fitting import fitted
from flowrl.training.hooks import HookChecks, LaterChecks, check_names
from flowrl.training.method import Method
from flowrl.training.networks import ExtraState
from flowrl.training.optimizers import gradient_step, share_of_step
from flowrl.training.policy import FlowPolicy
from flowrl.training.records import MinibatchFigures, RolloutRecord
from flowrl.training.reward_calls import RewardCalls, without_strays
from flowrl.training.rollout import filling
from flowrl.training.sb3_algorithm import SB3Algorithm, for_callbacks
from flowrl.training.signal import check_learnt
from flowrl.training.target import aim, held
from flowrl.types import Batch


class FlowAlgorithm(Method, SB3Algorithm):
    """Draw samples, reward them, weigh them, update the velocity network, refresh the copies; repeat.

    A subclass declares its `Config` and what it needs, and writes `loss` and one of `weigh` and `advantage`.

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
        seed = construction.checked_seed(seed, device)
        check_names(type(self), FlowAlgorithm)
        self.ranks = join(device) if ranks is None else ranks
        core = construction.as_generation_env(env, env_settings)
        self.config = self.configure(config, core.recommended, settings)
        construction.check_run(core, self.config, self.ranks.world_size, settings)
        self.fit = fitted(type(self), self.config, core, device, self.ranks)
        self.config, core = self.fit.config, self.fit.env
        construction.keep_freed_memory()
        if self.ranks.world_size > 1 and seed is None:
            seed = int(self.ranks.broadcast(str(construction.fresh_seed())))
        super().__init__(
            policy,
            GenerationVecEnv(core, self.config.rollout_batch_size or self.config.n_samples),
            learning_rate=self.config.learning_rate,
            policy_kwargs=policy_kwargs,
            tensorboard_log=tensorboard_log if self.ranks.is_main else None,
            verbose=verbose if self.ranks.is_main else 0,
            device=self.ranks.device or device,
            support_multi_env=True,
            seed=seed,
        )
        self.iteration = self.n_dropped = 0  # iterations so far, and samples that the reward failed for
        self.extra_state, self.record = ExtraState(), RolloutRecord()
        self.rollout_figures, self.last_logged, self.warned, self.misfit = {}, {}, set(), False
        self.checks = HookChecks(type(self).__name__)  # until the first iteration is over
        if _init_setup_model:
            self._setup_model()
            construction.check_set_up(self)
            if self.ranks.rank:
                torch.manual_seed(cast(int, self.seed) + self.ranks.rank)  # dropout is not drawn for all

    def _setup_model(self) -> None:
        config, core = self.config, self.env.core
        self.shares = None if core.shares is None else torch.from_numpy(core.shares).float().to(self.device)
        if self.seed is not None:
            self.set_random_seed(self.seed)
        construction.check_gradient(self, core, self.device)
        self.reward_calls = RewardCalls.of(core, config)
        core.gather_with(lambda rows: self.ranks.all_gather(rows, len(rows) * self.ranks.world_size))
        self.bad_updates, self.generator = BadUpdates(), SharedGenerator(self.device, self.ranks)
        self.generator.manual_seed(construction.fresh_seed() if self.seed is None else self.seed)
        with self.ranks.main_first():
            self.policy = cast(type[FlowPolicy], self.policy_class).of(
                core,
                config,
                copies=self.copies_for(config),
                device=self.device,
                seed=None if self.seed is None else self.seed + 1,
                **construction.policy_arguments(self.policy_class, FlowPolicy, self.policy_kwargs),
            )
        construction.prepare_training(self)
        self.buffer = RolloutBuffer(
            config.n_samples,
            self.policy.model.latent_shape if self.learns_from != "contexts" else (0,),
            self.device,
            group_size=config.group_size,
            half=config.half_buffer,
            ranks=self.ranks,
            parts=config.parts(),
            read=self.read if self.learns_from == "steps" else None,
        )

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str = "",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> FlowAlgorithm:
        """Train on `total_timesteps` generated samples (rounded up to whole iterations).

        The other arguments are stable-baselines3's; `log_interval` counts iterations, None leaves logs to callbacks.
        """
        log_interval = None if log_interval is None else counted("log_interval", log_interval)
        total_timesteps, called = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        self._update_current_progress_remaining(self.num_timesteps, max(total_timesteps, 1))
        called.on_training_start(for_callbacks(locals()), globals())
        while self.num_timesteps < total_timesteps:
            started = time.perf_counter()
            if not self.collect(called):
                break
            logged = self.update()
            if self.learns_from == "contexts":  # the updates drew the samples
                self._close_record()
            check_updates(self)
            if (self.iteration + 1) % self.config.refresh_every == 0 and self.may_refresh(logged):
                self.refresh()
            self.iteration, self.checks = self.iteration + 1, LaterChecks(type(self).__name__)
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            self.unlogged = logged, time.perf_counter() - started
            if log_interval and (self.iteration % log_interval == 0 or self.num_timesteps >= total_timesteps):
                self.dump_logs()
            called.update_locals(for_callbacks(locals()))
            if self.ranks.any(not _iteration_ended(called)):
                break
        called.on_training_end()
        check_learnt(self)
        return self

    def collect(self, callback: BaseCallback) -> bool:
        """Fill the buffer: `contexts -> draw -> reward -> weigh`; False when a callback stops the run."""
        callback.on_rollout_start()
        self.policy.set_training_mode(False)
        self.buffer.reset()
        self.record = RolloutRecord()
        drawn_contexts = self.contexts()
        self.checks.contexts(drawn_contexts, self.config.n_samples, len(self.env.core.contexts))
        chunks = drawn_contexts.split(self.env.num_envs)
        for (contexts, samples), drawn in zip(filling(self, [self.ranks.shard(chunk) for chunk in chunks]), chunks):
            self.num_timesteps += len(drawn) * self.draws
            known = {**for_callbacks(locals()), "contexts": contexts, "samples": samples}
            callback.update_locals({**known, "dones": [True] * len(drawn)})  # every sample is an episode
            if self.ranks.any(not callback.on_step()):
                return False
        self.buffer.share()
        if self.learns_from != "contexts":
            self._weigh()
            self._close_record()
        callback.on_rollout_end()
        return True

    def _weigh(self) -> None:
        """Turn the rewards of an iteration into coefficients."""
        rollout = self.buffer.all()
        aim(self, rollout)
        method = "advantage" if self.compares and not self.has_weights else "weigh"
        with self.checks.untouched(method, rollout):
            coefficient = getattr(self, method)(rollout)
        self.checks.coefficient(method, coefficient, rollout.reward)
        coefficient = without_strays(rollout, held(self, rollout, coefficient.detach()))
        self.signal.look(self, rollout, coefficient)
        self.buffer.coefficient[: self.buffer.size].copy_(coefficient)

    def _close_record(self) -> None:
        """Take the figures of an iteration's samples, and count those left out."""
        self.n_dropped += self.record.check_dropped(self)
        self.rollout_figures = self.record.figures(self)

    def minibatches(self) -> Iterator[Batch]:
        """Go over the buffer once, in the order that `order` gives."""
        order = self.order()
        self.checks.order(order, self.buffer.size * self.buffer.parts)
        return self.buffer.batches(order, self.config.batch_size)

    def update(self) -> dict[str, torch.Tensor]:
        """Take gradient steps on the buffer; metrics are means over entries, still on the device."""
        config, policy = self.config, self.policy
        if config.offload and self.learns_from != "contexts":
            policy.model.offload()
        is_last = config.accumulation - 1  # of the minibatches of a step; the ranks agree on its gradient there
        replays = self.replay.are_replayed(self)
        found, norms = MinibatchFigures(), list[torch.Tensor]()
        n_pending = n_entries = 0
        with policy.in_update():
            for batch in chain.from_iterable(self.minibatches() for _ in range(config.n_epochs)):
                with nullcontext() if n_pending == is_last else self.ranks.no_sync(policy.networks.trained):
                    figures = self.replay.gradient(self, batch, n_pending) if replays else self.gradient(batch)
                n_pending, n_entries = n_pending + 1, n_entries + len(batch.x_1)
                if n_pending == config.accumulation:
                    norms.append(gradient_step(self, n_entries))
                    n_pending = n_entries = 0
                found.add(figures, len(batch.x_1))
            if n_pending:
                self.ranks.average_gradients(policy.parameters_of("current").values())
                norms.append(gradient_step(self, n_entries))
        return found.means() | {"grad_norm": torch.stack(norms).mean()}

    def gradient(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Add the gradient of a minibatch's loss to those of before; the loss and its figures."""
        result = self.loss(batch)
        self.checks.loss(result)
        loss, parts = result
        share_of_step(self, loss, len(batch.x_1)).backward()
        return {"loss": loss.detach(), **{key: part.detach() for key, part in parts.items()}}


def _iteration_ended(callback: BaseCallback) -> bool:
    """Tell callbacks that have an `on_iteration_end` method; False when one of them stops the run.

    stable-baselines3's `on_step` comes in the middle of an iteration; only here can the state be saved whole.
    """
    children = getattr(callback, "callbacks", None)
    if children is not None:
        return all([_iteration_ended(child) for child in children])
    hook = getattr(callback, "on_iteration_end", None)
    return hook is None or hook() is not False
