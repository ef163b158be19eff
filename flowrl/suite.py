"""Suites of a benchmark: TOML files that say which algorithms are compared on what, at which cost.

description = "one line"
seeds = [0, 1, 2]
budget = 1_000_000              # network evaluations of each cell: a forward is 1 per sample, a backward 2
eval_samples = 1024

[envs.gaussians-linear]
settings = { }                  # of the environment
budget = 500_000                # instead of the suite's

[rows."Flow-GRPO"]              # what tables and plots call it
algo = "flow_grpo"              # or steer = { method = "best_of_n", n = 8 }: the untrained flow, steered
settings = { learning_rate = 1e-3 }
sweep = { beta = [0.01, 0.1] }  # one setting, one point of the frontier for each value
envs = ["gaussians-linear"]     # all of the suite when left out
on.gaussians-linear = { n_epochs = 2 }  # settings for that environment only
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from flowrl.algorithm import FlowAlgorithm
from flowrl.errors import ConfigError, UnknownNameError
from flowrl.registry import algorithm_class, environment_spec
from flowrl.steering import Steering

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

UNTRAINED = "orw"  # whose policy steering samples from, without a step of training
FOLDER = Path(__file__).parent / "suites"
SUITE_KEYS = ("description", "seeds", "budget", "eval_samples", "envs", "rows")
ENV_KEYS = ("settings", "budget")
ROW_KEYS = ("algo", "steer", "settings", "sweep", "envs", "on")


@dataclass(frozen=True)
class Cell:
    """One training (or steering) with one seed.

    Attributes:
        row: What tables call it.
        env: Name of the environment.
        algo: Name of the algorithm; empty for steering.
        seed: Seed of training and evaluation.
        budget: Network evaluations of the training; 0 for steering.
        eval_samples: Samples of the final evaluation.
        settings: Of the algorithm.
        env_settings: Of the environment.
        steer: Fields of `Steering`; empty for training.
        swept: The swept setting and its value; empty without a sweep.
        config: Every setting that the algorithm will have: its defaults, the environment's, the suite's.
    """

    row: str
    env: str
    algo: str
    seed: int
    budget: int
    eval_samples: int
    settings: dict[str, Any] = field(default_factory=dict)
    env_settings: dict[str, Any] = field(default_factory=dict)
    steer: dict[str, Any] = field(default_factory=dict)
    swept: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Row with the swept value."""
        return ", ".join([self.row, *(f"{key} = {value:g}" for key, value in self.swept.items())])

    @property
    def folder(self) -> str:
        """Where its results go, below the suite's folder."""
        name = re.sub(r"[^a-z0-9.=]+", "-", self.label.lower().replace(" = ", "=")).strip("-")
        return f"cells/{self.env.replace(':', '.')}/{name}/seed-{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def suites() -> list[str]:
    """Names of the suites that ship with flowrl."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_suite(
    name: str,
    algos: Iterable[str] = (),
    envs: Iterable[str] = (),
    seeds: Iterable[int] = (),
    budget: int | None = None,
) -> list[Cell]:
    """All cells of a suite, checked: every name and setting in it is known.

    Args:
        name: A shipped suite, or a TOML file.
        algos: Only rows of these algorithms ("best_of_n" and "smc" for steering).
        envs: Only these environments.
        seeds: Instead of the suite's.
        budget: Instead of the suite's and its environments'.

    Raises:
        UnknownNameError: An unknown suite, key, algorithm, environment or setting; names the closest.
        ConfigError: Settings without meaning, or a damaged file.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        if path.suffix == ".toml" and path.parent != FOLDER:
            raise ConfigError(f"There is no suite file '{path}'.")
        raise UnknownNameError.of("suite", name, suites())
    try:
        content = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The suite file '{path}' is damaged: {error}.") from error
    _check_keys(content, SUITE_KEYS, f"suite '{path.stem}'", required=("seeds", "budget", "envs", "rows"))
    chosen_envs, chosen_algos = _chosen(envs, content["envs"], "environment of this suite"), list(algos)
    _chosen(chosen_algos, {_algo_of(row) for row in content["rows"].values()}, "algorithm of this suite")
    cells = []
    for env in chosen_envs:
        about = content["envs"][env]
        _check_keys(about, ENV_KEYS, f"environment '{env}'")
        spec = environment_spec(env)
        recommended = spec.recommended(spec.configured(about.get("settings", {})))
        for title, row in content["rows"].items():
            _check_keys(row, ROW_KEYS, f"row '{title}'")
            if (chosen_algos and _algo_of(row) not in chosen_algos) or env not in row.get("envs", [env]):
                continue
            for values in _swept(row, title):
                for seed in list(seeds) or content["seeds"]:
                    cell = _cell(content, title, row, env, about, values, int(seed), budget)
                    cells.append(replace(cell, config=_config(cell, recommended)))
    if not cells:
        raise ConfigError(f"Nothing is left of suite '{path.stem}' with this choice of algorithms and environments.")
    return cells


def _cell(
    suite: Mapping[str, Any],
    title: str,
    row: Mapping[str, Any],
    env: str,
    about: Mapping[str, Any],
    swept: dict[str, float],
    seed: int,
    budget: int | None,
) -> Cell:
    steer = {**row["steer"], **swept} if "steer" in row else {}
    settings = {**row.get("settings", {}), **row.get("on", {}).get(env, {}), **({} if steer else swept)}
    return Cell(
        row=title,
        env=env,
        algo=row.get("algo", ""),
        seed=seed,
        budget=0 if steer else budget or about.get("budget", suite["budget"]),
        eval_samples=suite.get("eval_samples", 1024),
        settings=settings,
        env_settings=about.get("settings", {}),
        steer=steer,
        swept=swept,
    )


def _config(cell: Cell, recommended: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of the algorithm; names and values have meaning. Nothing is trained or loaded."""
    try:
        if cell.steer:
            known = [f.name for f in fields(Steering)]
            for key in cell.steer:
                if key not in known:
                    raise UnknownNameError.of("setting of steering", key, known)
            Steering(**cell.steer)
        cls: type[FlowAlgorithm] = algorithm_class(cell.algo or UNTRAINED)
        return asdict(cls.configure(None, recommended, cell.settings))
    except (ConfigError, UnknownNameError) as error:
        raise type(error)(f"Row '{cell.row}' on '{cell.env}': {error}") from error


def _swept(row: Mapping[str, Any], title: str) -> list[dict[str, float]]:
    sweep = row.get("sweep", {})
    if len(sweep) > 1:
        raise ConfigError(f"Row '{title}' sweeps {', '.join(sweep)}: a row sweeps one setting; make further rows.")
    return [{key: value} for key, values in sweep.items() for value in values] or [{}]


def _algo_of(row: Mapping[str, Any]) -> str:
    if ("algo" in row) == ("steer" in row):
        raise ConfigError("Every row of a suite names either an algo or how to steer.")
    return row["algo"] if "algo" in row else row["steer"].get("method", "best_of_n")


def _chosen(wanted: Iterable[str], known: Iterable[str], kind: str) -> list[str]:
    known = list(known)
    for name in wanted:
        if name not in known:
            raise UnknownNameError.of(kind, name, known)
    return [name for name in known if name in set(wanted)] if wanted else known


def _check_keys(table: Mapping[str, Any], known: Iterable[str], where: str, required: Iterable[str] = ()) -> None:
    for key in table:
        if key not in known:
            raise UnknownNameError.of(f"key in {where}", key, known)
    for key in required:
        if key not in table:
            raise ConfigError(f"The {where} lacks '{key}'.")
