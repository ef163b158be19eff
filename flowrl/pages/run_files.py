"""What the files of a run folder say of a run."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flowrl.errors import CheckpointError, ConfigError
from flowrl.registry import ALGORITHMS
from flowrl.runs.logs import WARNINGS, read_metrics
from flowrl.runs.pictures import STEPS
from flowrl.storage.files import read_file, read_json
from flowrl.training.loading import DAMAGE

Row = dict[str, float]
LARGEST_SOUND = 2**24
"""Bytes: some minutes."""


@dataclass(frozen=True)
class RunFiles:
    """The files of a run folder that pages are made from.

    Attributes:
        name: Of the folder.
        config: `config.json`.
        rows: `metrics.csv`.
        evaluation: `evaluation{tag}.json`; empty when there is none.
        before_after: The picture of samples, PNG; empty when there is none.
        warnings: Warnings of the training.
        sounds: Contexts, and what a sample of each sounds like before and after, WAV.
    """

    name: str
    config: dict[str, Any]
    rows: list[Row]
    evaluation: dict[str, Any]
    before_after: bytes
    warnings: list[str]
    sounds: list[tuple[str, bytes, bytes]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, tag: str = "") -> RunFiles:
        """Read a run folder.

        Raises:
            ConfigError: It is none, or a file in it is damaged.
        """
        evaluation, picture, warnings = (
            folder / name for name in (f"evaluation{tag}.json", f"before_after{tag}.png", WARNINGS)
        )
        try:
            config = read_json(folder / "config.json")
            evaluated = read_json(evaluation) if evaluation.exists() else {}
        except CheckpointError as error:
            raise ConfigError(f"'{folder}' is no run folder: {error}") from error
        return cls(
            folder.resolve().name,
            config,
            read_metrics(folder / "metrics.csv"),
            evaluated,
            picture.read_bytes() if picture.exists() else b"",
            warnings.read_text("utf-8").splitlines() if warnings.exists() else [],
            _sounds(folder / f"sounds{tag}"),
        )

    @property
    def environment(self) -> dict[str, Any]:
        """The environment in `config.json`; empty for an object that no name stands for."""
        return self.config.get("environment") or {}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of algorithm and environment, `algo.X` and `env.X`, that are not the algorithm's own defaults."""
        algorithm = ALGORITHMS.get(self.config.get("algorithm", ""))
        defaults: Mapping[str, Any] = {} if algorithm is None else asdict(algorithm.Config())  # type: ignore[attr-defined]
        given = {
            f"algo.{key}": value
            for key, value in self.config.get("settings", {}).items()
            if key not in defaults or json.dumps(defaults[key]) != json.dumps(value)
        }
        return given | {f"env.{key}": value for key, value in self.environment.get("settings", {}).items()}

    @property
    def reference(self) -> dict[str, Any]:
        """Figures of the flow before training; empty without an evaluation."""
        return self.evaluation.get("reference") or {}

    @property
    def last(self) -> Row:
        """The last row of the metrics; empty before the first."""
        return self.rows[-1] if self.rows else {}

    def along(self, axis: str) -> list[float]:
        """Give the place of each row on an axis: samples, network evaluations, or hours of training."""
        if axis == "samples":
            return [row.get(STEPS, math.nan) for row in self.rows]
        if axis == "evaluations":
            return [row.get("time/network_evaluations", math.nan) for row in self.rows]
        hours, elapsed, before = [], 0.0, 0.0
        for row in self.rows:
            steps, speed = row.get(STEPS, before), row.get("time/samples_per_second", math.nan)
            elapsed, before = elapsed + (steps - before) / speed / 3600, steps
            hours.append(elapsed)
        return hours


def _sounds(folder: Path) -> list[tuple[str, bytes, bytes]]:
    """Read what `flowrl.runs.media.save_sounds` wrote; nothing where there are none.

    Raises:
        ConfigError: A file is missing or damaged; names it.
    """
    if not (folder / "contexts.json").exists():
        return []
    try:
        contexts = read_json(folder / "contexts.json")["contexts"]
        before, after = (
            [read_file(folder / f"{i}-{side}.wav", LARGEST_SOUND) for i in range(len(contexts))]
            for side in ("before", "after")
        )
        return list(zip(map(str, contexts), before, after))
    except (OSError, CheckpointError, *DAMAGE) as error:
        raise ConfigError(
            f"The sounds in '{folder}' are damaged: {error}; write them anew by flowrl.evaluate."
        ) from error


@contextlib.contextmanager
def telling_damage() -> Iterator[None]:
    """Raise a `ConfigError` where files hold something else than a run writes; a context, or a decorator."""
    try:
        yield
    except DAMAGE as error:
        raise ConfigError(f"config.json, metrics.csv or evaluation.json is damaged: {error}.") from error
