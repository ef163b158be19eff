"""What a run is going to do, in words: the first lines of a run, and `--dry-run`."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import torch
from stable_baselines3.common.utils import get_device

from flowrl.config import FlowConfig
from flowrl.distributed.ranks import Ranks
from flowrl.envs.base import GenerationEnv
from flowrl.models.attention import set_attention_backend
from flowrl.models.compiling import cache_folder, repeated_blocks
from flowrl.models.lora import LoRA, count_parameters
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.training.fitting import fitted
from flowrl.training.memory_plan import predict_memory
from flowrl.training.rollout import overlaps
from flowrl.training.saving import algorithm_name


def head_of(model: FlowAlgorithm, folder: Path, total: int) -> str:
    """Say which flow, which reward, how long, and where the files go: the first lines of a run."""
    lines = [
        *_chosen(type(model), model.config, model.env.core),
        f"device: {model.device}{_shared_by(model.ranks.world_size)}, seed: {model.seed}",
        _work(type(model), model.config, total),
        *model.fit.lines,
        *_speed(model),
        *_overlap(model),
        f"files: {folder}",
    ]
    return "\n".join(lines)


def _speed(model: FlowAlgorithm) -> list[str]:
    """Say what is compiled and captured, and what that costs at first."""
    kind = model.policy.networks.compiled
    what = {"blocks": "each kind of block that the network repeats", "whole": "the whole network"}.get(kind)
    network, lines = model.policy.networks.model.network, []
    if kind == "blocks" and repeated_blocks(network) == [network]:
        what = "the whole network, as it repeats no blocks"
    if what:
        lines.append(
            f"compile: {what}, in the first pass of each batch size, with and without gradients; for a large "
            f"network the first iteration takes {'a minute or two' if kind == 'blocks' else 'several minutes'} longer. "
            f"Compiled code is kept in {cache_folder()}"
        )
    elif model.config.compile == "auto":
        lines.append("compile: off, which pays for large networks on CUDA only; --algo.compile blocks does it anyway")
    if model.config.cuda_graphs:
        is_on = model.policy.graphs.is_on
        why = "captured in the first iterations" if is_on else "off: for small networks on one CUDA device"
        lines.append(f"CUDA graphs: {why}")
    return lines


def _overlap(model: FlowAlgorithm) -> list[str]:
    """Say whether rewards are computed while samples are drawn, where that was asked or is done."""
    if overlaps(model):
        return [f"rewards: in a thread, while the next {model.config.rollout_batch_size} samples are drawn"]
    if model.config.overlap_rewards == "on":
        return [
            "rewards: not while samples are drawn, which takes one process, --algo.rollout-batch-size below n_samples, "
            "no CUDA graphs, and an algorithm that draws without knowing them"
        ]
    return []


def _chosen(algo: type[FlowAlgorithm], config: FlowConfig, env: GenerationEnv) -> list[str]:
    return [
        f"algorithm: {algorithm_name(algo)}, settings that differ from its defaults: {_differences(config)}",
        f"environment: {env.name}",
        *env.describe(),
    ]


def _shared_by(n_ranks: int) -> str:
    return f" and {n_ranks - 1} more, which share every batch" if n_ranks > 1 else ""


def _differences(config: FlowConfig) -> str:
    default = type(config)()
    changed = [f.name for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)]
    return ", ".join(f"{name}={getattr(config, name)}" for name in changed) or "none"


def _work(algo: type[FlowAlgorithm], config: FlowConfig, total: int) -> str:
    drawn = config.n_samples * (config.n_epochs if algo.learns_from == "contexts" else 1)
    iterations = -(-total // drawn)
    return (
        f"plan: {iterations} iterations of {drawn} samples ({iterations * drawn} samples), "
        f"{iterations * config.updates_per_iteration()} gradient steps"
    )


def dry_run(
    folder: Path,
    algo: type[FlowAlgorithm],
    config: FlowConfig,
    env: GenerationEnv,
    total: int,
    n_ranks: int = 1,
    device: str = "cpu",
) -> str:
    """Say what a run on a device would do, for `--dry-run`: reads configurations, loads no weights."""
    precision = getattr(torch, config.precision)
    set_attention_backend(env.flow.skeleton().network, config.attention_backend, get_device(device), precision)
    frozen, trained = count_parameters(env.flow.skeleton(), LoRA.of(config), config.trained_parameters)
    fit = fitted(algo, config, env, device, Ranks(), n_ranks)
    config, env = fit.config, fit.env
    memory = fit.plan or predict_memory(algo, config.of_one_rank(n_ranks), env)
    lines = [
        *_chosen(algo, config, env),
        _work(algo, config, total),
        *fit.lines,
        f"trainable parameters: {trained:,} of {frozen + trained:,} in the velocity network",
        f"memory of the network and its training{f', on each of {n_ranks} devices' if n_ranks > 1 else ''}, by part:",
        *(f"  {name}: {_bytes(size)}" for name, size in memory.parts.items()),
        "most memory at once, by phase (those parts, activations, autoencoder, text encoders):",
        *(f"  {name}: {_bytes(size)}" for name, size in memory.phases.items()),
        f"  peak: {_bytes(memory.peak)} of tensors; on the CPU with {_bytes(memory.libraries)} of libraries "
        f"{_bytes(memory.peak + memory.libraries)}",
        *([f"  not tried: {memory.missing}"] if memory.missing else []),
        f"files: {folder}{os.sep} (config.json, metrics.csv, samples/, checkpoints/, final/, report.html)",
        "dry run: nothing was written",
    ]
    return "\n".join(lines)


def _bytes(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"
