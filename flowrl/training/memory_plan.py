"""The memory plan of a run: its own code, run on tensors that have shapes and types but no storage."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from flowrl.distributed.ranks import Ranks
from flowrl.errors import FlowRLError
from flowrl.training.hooks import LaterChecks
from flowrl.training.rollout import filling, roll_out
from flowrl.training.without_storage import WithoutStorage, without_storage
from flowrl.types import RewardOutput, Rows

if TYPE_CHECKING:
    from flowrl.config import FlowConfig
    from flowrl.envs.base import GenerationEnv
    from flowrl.training.algorithm import FlowAlgorithm

DEPENDS_ON_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""What tensors without storage raise where their values are asked for."""
STEPS = 2
"""Sampler steps that are tried; what an ODE sampler holds does not depend on their number."""


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted memory in bytes.

    Attributes:
        parts: What is there while the network trains, by part.
        phases: The most that is there at once in each phase.
        libraries: What this process holds without those tensors: libraries, and networks of the reward.
        missing: What could not be tried, and why; empty when all was.
    """

    parts: dict[str, int]
    phases: dict[str, int]
    libraries: int
    missing: str = ""

    @property
    def peak(self) -> int:
        """The most that all tensors take at once."""
        return max(self.phases.values())


def ways_to_save(config: FlowConfig) -> list[str]:
    """List settings that lower the memory of a run, in the order to try them: first what costs time only."""
    large, idle = config.batch_size > 1, config.idle()
    ways = {
        "--algo.precision bfloat16": config.precision == "float32",
        "--algo.gradient-checkpointing": not config.gradient_checkpointing,
        f"--algo.batch-size {max(1, config.batch_size // 2)} --algo.accumulation {2 * config.accumulation}": large,
        "a smaller --algo.rollout-batch-size": config.rollout_batch_size != 1 and "rollout_batch_size" not in idle,
        "--env.decode-batch 1 or --env.vae-tiling": True,
        "--algo.offload": not config.offload and "offload" not in idle,
        "--algo.lora-rank 32": not config.lora_rank,
        "--algo.optimizer adamw8bit": config.optimizer == "adamw",
        "--algo.working-copies off": config.working_copies != "off" and has_working_copies(config),
        "a smaller --env.resolution": True,
    }
    return [way for way, applies in ways.items() if applies]


def has_working_copies(config: FlowConfig) -> bool:
    """Tell whether passes without gradients have weights of their own, unless they are told not to."""
    return bool(config.lora_rank) or config.precision != "float32"


def predict_memory(cls: type[FlowAlgorithm], config: FlowConfig, env: GenerationEnv) -> MemoryPlan:
    """Predict the memory of a run with these settings, from the flow's configuration alone: no weight is read.

    One iteration is tried: prompts encoded, a batch drawn and decoded, a gradient step. Work that depends on the
    values of tensors (adaptive solvers, optimal transport) cannot be tried; `missing` says so.
    """
    copies = "on" if config.working_copies == "auto" else config.working_copies
    config = replace(config, on_reward_error="raise", compile="off", cuda_graphs=False)
    config = replace(config, working_copies=copies, fit_memory=(), attention_backend="")  # nothing to choose, or try
    random_state = torch.get_rng_state()
    gc.freeze()  # looking for what is left between two phases then looks at the prediction's own objects
    try:
        with without_storage() as tracker:
            parts, missing = _try(cls, replace(config, n_epochs=1), env, tracker)
            gc.collect()
    finally:
        gc.unfreeze()
    torch.set_rng_state(random_state)
    return MemoryPlan(parts, tracker.phases, psutil.Process().memory_info().rss, missing)


def _try(
    cls: type[FlowAlgorithm], config: FlowConfig, env: GenerationEnv, tracker: WithoutStorage
) -> tuple[dict[str, int], str]:
    env = copy.copy(env)
    env.flow = replace(env.flow, load=env.flow.imitation)
    with tracker.phase("loading, encoding prompts"):
        model: Any = cls("FlowPolicy", env, config=config, device="cpu", ranks=Ranks())
    model.checks, model.reward_calls = (
        LaterChecks(type(model).__name__),
        partial(_imitated_reward, tuple(env.reward_weights)),
    )
    missing, networks = cls.unpredictable, model.policy.networks
    for role in {model.policy.sampling_role, "reference"} & set(networks.available):  # pictures, drifts, evaluations
        if networks.with_working_copies:
            networks.working(role)
    try:
        _iterate(model, tracker)
    except Exception as error:
        missing = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return _parts(model), missing


def _iterate(model: Any, tracker: WithoutStorage) -> None:
    """Go through an iteration by the algorithm's own methods, with one chunk of samples and one gradient step."""
    policy, buffer, config = model.policy, model.buffer, model.config
    _without_values(model, "contexts", lambda: torch.zeros(config.n_samples, dtype=torch.long))
    ids = model.contexts()[: model.env.num_envs]
    if model.learns_from == "contexts":
        list(filling(model, [ids]))
    else:
        draw = tracker.within("drawing samples", partial(_drawn, model))
        decode, reward = (tracker.within("decoding samples", work) for work in (policy.decode, model.reward))
        done = roll_out(ids, draw, decode, reward)
        with tracker.phase("decoding samples"):
            buffer.add(done.x_1, ids, done.output.reward, {**done.rows, **model.rows_of(done.output)})
        del done
    n = -(-config.batch_size * config.accumulation // buffer.parts)
    buffer.size = min(config.n_samples, -(-n // config.group_size) * config.group_size)
    n = min(buffer.size * buffer.parts, config.entries_per_epoch())
    _without_values(model, "order", lambda: torch.arange(n))
    for parameter in policy.parameters_of("current").values():
        parameter.grad = torch.zeros_like(parameter)
    policy.optimizer.step()  # its moments are there from the first step on
    policy.optimizer.zero_grad()
    with tracker.phase("training"):
        with contextlib.suppress(*DEPENDS_ON_VALUES):  # weights are numbers, no memory
            if not model.unpredictable:
                model._weigh()
        model.iteration += 1  # what a first iteration looks at are values
        model.update()


def _without_values(model: Any, method: str, otherwise: Callable[[], torch.Tensor]) -> None:
    """Put another method in place of one that depends on the values of tensors, as those without storage have none."""
    try:
        getattr(model, method)()
    except DEPENDS_ON_VALUES:
        setattr(model, method, otherwise)


def _drawn(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, Rows]:
    """Draw by the algorithm's own method; where its work is unpredictable, by the policy alone.

    With few steps of the sampler first: an ODE sampler holds no more with many. A method that asks for more steps, or
    whose rows may be of the sampler's steps, then draws with all.
    """
    policy, steps = model.policy, model.config.rollout_steps
    if model.unpredictable:
        policy.steps = min(STEPS, steps)
        return policy.sample_latents(ids, role=model.behaviour_role, generator=model.generator), {}
    if model.learns_from == "samples":
        policy.steps = min(STEPS, steps)
        if getattr(model.config, "draw_steps", 0):
            model.config = replace(model.config, draw_steps=min(STEPS, model.config.draw_steps))
        with contextlib.suppress(FlowRLError):
            x_1, rows = model.draw(ids)
            if not any(row.dim() > 1 for row in rows.values()):
                return x_1, rows
        policy.steps = steps
    return model.draw(ids)


def _imitated_reward(
    components: tuple[str, ...], samples: torch.Tensor, context_ids: torch.Tensor, *, grad: bool = False
) -> tuple[RewardOutput, torch.Tensor]:
    """Stand in for a reward, whose own memory is not counted: with a gradient by the samples, as `RewardCalls`."""
    reward = samples.flatten(1).float().mean(1)
    everything = torch.arange(len(samples), device=samples.device)
    return RewardOutput(reward, dict.fromkeys(components, reward.detach())), everything


def _parts(model: Any) -> dict[str, int]:
    policy = model.policy
    sizes = {role: _bytes(policy.parameters_of(role).values()) for role in policy.roles}
    return {
        "frozen weights": _bytes(policy.parameters()) - sum(sizes.values()),
        "trained weights": sizes.pop("current"),
        "copies of them": sum(sizes.values()),
        "copies to compute with": policy.networks.working_bytes,
        "gradients": _bytes(policy.parameters_of("current").values()),
        "optimizer": _bytes(v for state in policy.optimizer.state.values() for v in state.values()),
        "further networks and tensors": _bytes(model.extra_state.state().values()),
        "encoded prompts": _bytes(policy.condition(torch.arange(len(policy.contexts)))),
        "rollout buffer": model.buffer.nbytes,
    }


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
