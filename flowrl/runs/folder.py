"""The run folder: `runs/NAME/` with config.json, metrics.csv, samples/, checkpoints/, final/ and report.html."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flowrl.config import FlowConfig
from flowrl.envs.base import GenerationEnv
from flowrl.errors import ConfigError
from flowrl.evaluation.measure import EvaluationResult
from flowrl.models.lora import LoRA, count_parameters
from flowrl.registry import algorithm_class, environment_spec
from flowrl.storage.files import write_json
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.training.loading import load_checkpoint
from flowrl.training.memory_plan import predict_memory
from flowrl.training.saving import algorithm_name, description


def create(out: Path, name: str, env_name: str) -> Path:
    """A new folder `out/name`, or `out/name-2`, ... when there is one already.

    Raises:
        ConfigError: It cannot be created or written; says why.
    """
    folder = new_folder(out, name)
    try:
        (folder / "config.json").touch()
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Context in which no other process writes into a run folder; a process that is killed leaves it, too.

    Raises:
        ConfigError: Another process is writing into it.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"Another process is training in '{folder}'. Wait for it, stop it, or train elsewhere with --name."
        ) from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def new_folder(out: Path, name: str) -> Path:
    """Make the folder `out/name`, or `out/name-2`, ... when there is something of that name already.

    Raises:
        ConfigError: It cannot be created; says why.
    """
    folder, n = out / name, 1
    try:
        out.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                n += 1
                folder = out / f"{name}-{n}"
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(folder: Path, error: Exception, hint: str = "Choose another place with --out.") -> ConfigError:
    """The error for a folder that takes no files: read-only, full, no such place."""
    reason = getattr(error, "strerror", None) or str(error)
    return ConfigError(f"Cannot write to '{folder}': {reason}. {hint}")


def load_model(path: Path, algo: str = "", env: str = "", device: str = "auto") -> FlowAlgorithm:
    """The trained algorithm of a run folder (its newest state) or of a checkpoint folder.

    Args:
        path: The folder.
        algo: `module:Class` of a third-party algorithm; by default that in the checkpoint, which must be registered.
        env: `module:name` of a third-party environment; likewise.
        device: Where to compute.

    Raises:
        CheckpointError: There is none, or it is damaged or does not fit.
        UnknownNameError: No such algorithm or environment.
    """
    cls: Any = algorithm_class(algo) if algo else FlowAlgorithm
    return load_checkpoint(cls, path, env=environment_spec(env).name if env else None, device=device)


def write_config(folder: Path, model: FlowAlgorithm, extra: dict[str, Any]) -> None:
    """Write `config.json`: what was run, enough to run it again."""
    write_json(folder / "config.json", {**description(model), **extra, "device": str(model.device)})


def write_evaluation(folder: Path, result: EvaluationResult, tag: str = "") -> Path:
    """Write `evaluation{tag}.json`; numbers that do not exist are null."""
    path = folder / f"evaluation{tag}.json"
    write_json(path, finite_or_none(result.to_dict()))
    return path


def finite_or_none(value: Any) -> Any:
    """The same numbers, dicts and lists, with None for those that are not finite: JSON has none."""
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def header(model: FlowAlgorithm, folder: Path, total: int) -> str:
    """First lines of a run: which flow, which reward, how long, where the files go."""
    lines = [
        f"algorithm: {algorithm_name(type(model))}, settings that differ from its defaults: "
        f"{_differences(model.config)}",
        f"environment: {model.env.core.name}",
        *model.env.core.describe(),
        f"device: {model.device}{_shared_by(model.ranks.world_size)}, seed: {model.seed}",
        _work(model.config, total),
        f"files: {folder}",
    ]
    return "\n".join(lines)


def _shared_by(n_ranks: int) -> str:
    return f" and {n_ranks - 1} more, which share every batch" if n_ranks > 1 else ""


def _differences(config: FlowConfig) -> str:
    default = type(config)()
    changed = [f.name for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)]
    return ", ".join(f"{name}={getattr(config, name)}" for name in changed) or "none"


def _work(config: FlowConfig, total: int) -> str:
    iterations = -(-total // config.n_samples)
    return (
        f"plan: {iterations} iterations of {config.n_samples} samples ({iterations * config.n_samples} samples), "
        f"{iterations * config.updates_per_iteration()} gradient steps"
    )


def plan(
    folder: Path, algo: type[FlowAlgorithm], config: FlowConfig, env: GenerationEnv, total: int, n_ranks: int = 1
) -> str:
    """What a run would do, for `--dry-run`: reads configurations, loads no weights."""
    frozen, trained = count_parameters(env.flow.skeleton(), LoRA.of(config))
    memory = predict_memory(algo, config.of_one_rank(n_ranks), env)
    lines = [
        f"algorithm: {algorithm_name(algo)}, settings that differ from its defaults: {_differences(config)}",
        f"environment: {env.name}",
        *env.describe(),
        _work(config, total),
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
