"""The run folder: `runs/NAME/` with config.json, metrics.csv, samples/, checkpoints/, final/ and report.html."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flowrl.errors import ConfigError, FlowRLError
from flowrl.evaluation.measure import EvaluationResult
from flowrl.registry import algorithm_class, environment_spec
from flowrl.storage.files import read_json, write_json
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.training.loading import load_checkpoint, of_newest
from flowrl.training.saving import description


def create_run_folder(out: Path, name: str) -> Path:
    """Make a run folder `out/name`, or `out/name-2`, ... when there is one already.

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
def alone_in(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing into a folder, or wait for them; a process that is killed does so no longer.

    Raises:
        ConfigError: Another process is writing into it, and is not to be waited for.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise ConfigError(
            f"Another process is training in '{nearest(folder)}'. Wait for it, stop it, or train elsewhere with --name."
        ) from error
    except OSError as error:
        raise cannot_write(nearest(folder), error, "Make it writable, or go on in a copy of it.") from error
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


def nearest(path: Path) -> Path:
    """Give a path as seen from the current folder, where it lies in that."""
    with contextlib.suppress(OSError, ValueError):  # the current folder has gone; or the path lies elsewhere
        return path.relative_to(Path.cwd())
    return path


def as_word(folder: Path) -> str:
    """Write a folder as a command takes it: quoted, and not as an option where its name begins with a hyphen."""
    word = str(nearest(folder))
    return shlex.quote(f"./{word}" if word.startswith("-") else word)


def cannot_write(folder: Path, error: Exception, hint: str = "Choose another place with --out.") -> ConfigError:
    """Make the error for a folder that takes no files: read-only, full, no such place."""
    reason = getattr(error, "strerror", None) or str(error)
    return ConfigError(f"Cannot write to '{folder}': {reason}. {hint}")


@contextlib.contextmanager
def writing_to(folder: Path, hint: Callable[[], str]) -> Iterator[None]:
    """Say in one line that a folder takes no files, and what to do about it."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FlowRLError | BrokenPipeError):  # a pipe's reader that is gone is no folder's fault
            raise
        raise cannot_write(folder, error, hint()) from error


def load_model(path: Path, algo: str = "", env: str = "", device: str = "auto") -> FlowAlgorithm:
    """Load the trained algorithm of a run folder (its newest state) or of a checkpoint folder.

    Args:
        path: The folder.
        algo: `module:Class` of a third-party algorithm; by default that in the checkpoint, which must be registered, or
            of a module that has been imported.
        env: `module:name` of a third-party environment; likewise.
        device: Where to compute.

    Raises:
        CheckpointError: There is none, or it is damaged or does not fit.
        UnknownNameError: No such algorithm or environment.
    """
    named = environment_spec(env).name if env else None
    return of_newest(
        path,
        lambda folder: load_checkpoint(algorithm_of(folder, algo), folder, env=named, device=device, to_train=False),
    )


def environment_of(path: Path) -> str:
    """Name the environment that a run or a checkpoint was trained on; empty where it was an object without a name."""
    stored = of_newest(path, lambda folder: read_json(folder / "config.json")).get("environment")
    return str(stored.get("name", "")) if isinstance(stored, dict) else ""


def algorithm_of(checkpoint: Path, named: str = "") -> type[FlowAlgorithm]:
    """Find the class to load a checkpoint with: the one named, one of a module that the user imported, or the base."""
    if named:
        return algorithm_class(named)
    return imported_algorithm(read_json(checkpoint / "config.json").get("algorithm")) or FlowAlgorithm


def imported_algorithm(name: Any) -> type[FlowAlgorithm] | None:
    """Find the class of a `module:Class` that a file names, if the module has been imported; nothing is imported."""
    if not isinstance(name, str):
        return None
    module, _, attribute = name.partition(":")
    cls = vars(sys.modules[module]).get(attribute) if module in sys.modules else None
    return cls if isinstance(cls, type) and issubclass(cls, FlowAlgorithm) else None


def write_config(folder: Path, model: FlowAlgorithm, extra: dict[str, Any]) -> None:
    """Write `config.json`: enough to run the same again.

    Of a run that goes on, what training has made of `target_lambda` is in its checkpoints, and not what was asked for.
    """
    path, content = folder / "config.json", description(model)
    before = read_json(path).get("settings") if model.iteration and path.exists() else None
    if isinstance(before, dict) and model.tilt_setting is not None:
        names = ("target_lambda", model.tilt_setting[0])
        content["settings"] |= {name: before[name] for name in names if name in before}
    write_json(path, {**content, **extra, "device": str(model.device)})


def tell_edits(folder: Path, model: FlowAlgorithm) -> None:
    """Warn of settings in a run folder's `config.json` that are not those of its checkpoint, which count."""
    asked, own = read_json(folder / "config.json").get("settings"), description(model)["settings"]
    own = json.loads(json.dumps(own))  # as a file holds them: tuples are lists
    aimed, given = ("target_lambda", *(model.tilt_setting or ())[:1]), asked if isinstance(asked, dict) else {}
    odd = [key for key in own if key in given and key not in aimed and given[key] != own[key]]
    if odd:
        said = ", ".join(f"{key} {given[key]!r}, not {own[key]!r}" for key in odd[:5])
        warnings.warn(
            f"'{folder / 'config.json'}' has other settings than the checkpoint ({said}). Those of the checkpoint "
            f"count. To train its flow on with others, in Python: cls.load('{folder}', {odd[0]}=...).learn(N).",
            stacklevel=2,
        )


def write_evaluation(folder: Path, result: EvaluationResult, tag: str = "") -> Path:
    """Write `evaluation{tag}.json`; numbers that do not exist are null."""
    path = folder / f"evaluation{tag}.json"
    write_json(path, finite_or_none(result.to_dict()))
    return path


def finite_or_none(value: Any) -> Any:
    """Copy numbers, dicts and lists, with None for numbers that are not finite: JSON has none."""
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
