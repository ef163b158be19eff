"""Suites of a benchmark: TOML files that say which algorithms are compared on what, at which cost.

description = "one line"
seeds = [0, 1, 2]
budget = 1_000_000              # network evaluations of each cell: a forward is 1 per sample, a backward 2
eval_samples = 1024
target_lambda = 1.0             # what rows aim at whose algorithm states a tilt, where they do not set it themselves

[envs.gaussians-linear]
settings = { }                  # of the environment
budget = 500_000                # instead of the suite's
eval_rewards = ["NAME"]         # rewards that training does not see, as --eval-rewards of a run

[rows."Flow-GRPO"]              # what tables and plots call it
algo = "flow_grpo"              # or steer = { method = "best_of_n", n = 8 }: the untrained flow, steered
settings = { learning_rate = 1e-3 }
sweep = { beta = [0.01, 0.1] }  # one setting, one point of the frontier for each value
envs = ["gaussians-linear"]     # all of the suite when left out
on.gaussians-linear = { n_epochs = 2 }  # settings for that environment only

A suite may be somebody else's: every key and type is checked, and modules that it names are not imported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from flowrl.checks import is_finite, is_whole, shown
from flowrl.envs.rewards.catalogue import reward_entry
from flowrl.envs.rewards.mixture import parse_mixture
from flowrl.errors import ConfigError, UnknownNameError
from flowrl.evaluation.steering import Steering
from flowrl.registry import algorithm_class, environment_spec, named_by_a_file
from flowrl.storage.files import read_file
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.training.construction import check_idle

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
LARGEST, MOST_CELLS, LONGEST_TITLE = 2**20, 10_000, 100
"""Bytes of a suite file, cells that it may stand for, characters of a row's name."""
MOST_DOTS = 1000
"""In a line: of a key of n parts tomllib keeps all n beginnings, n parts long."""
REMEDY = "add --modules NAME if you trust it"
AGAIN = "Remove its folder to run that cell again."
Kind = tuple[str, Callable[[Any], bool]]
TABLE: Kind = ("a table", lambda value: isinstance(value, dict))
TEXT: Kind = ("a text", lambda value: isinstance(value, str))
COUNT: Kind = ("a whole number above 0", lambda value: is_whole(value, 1))
TEXTS: Kind = ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value))
POSITIVE: Kind = ("a number above 0", lambda value: is_finite(value) and value > 0)
SEEDS: Kind = (
    "a list of whole numbers from 0 to 4294967295",
    lambda value: isinstance(value, list) and len(value) > 0 and all(is_whole(v, 0, 2**32 - 1) for v in value),
)
SWEEP: Kind = (
    "a table of lists of numbers",
    lambda value: (
        isinstance(value, dict)
        and all(isinstance(v, list) and len(v) > 0 and all(map(is_finite, v)) for v in value.values())
    ),
)
SUITE_KEYS = {
    "description": TEXT,
    "seeds": SEEDS,
    "budget": COUNT,
    "eval_samples": COUNT,
    "target_lambda": POSITIVE,
    "envs": TABLE,
    "rows": TABLE,
}
ENV_KEYS = {"settings": TABLE, "budget": COUNT, "eval_rewards": TEXTS}
ROW_KEYS = {"algo": TEXT, "steer": TABLE, "settings": TABLE, "sweep": SWEEP, "envs": TEXTS, "on": TABLE}


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
        eval_rewards: Names of rewards that training does not see.
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
    eval_rewards: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Row with the swept value."""
        return ", ".join([self.row, *(f"{key} = {value:g}" for key, value in self.swept.items())])

    @property
    def folder(self) -> str:
        """Folder of its results, below the suite's."""
        name = re.sub(r"[^a-z0-9.=]+", "-", self.label.lower().replace(" = ", "=")).strip("-")
        env = re.sub(r"[^A-Za-z0-9._-]+", "-", self.env.replace(":", "."))
        return f"cells/{env}/{name}/seed-{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Give all fields, for JSON."""
        return asdict(self)


def suites() -> list[str]:
    """Name the suites that ship with flowrl."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_suite(
    name: str,
    algos: Iterable[str] = (),
    envs: Iterable[str] = (),
    seeds: Iterable[int] = (),
    budget: int | None = None,
) -> list[Cell]:
    """Read all cells of a suite, and check that every name and setting in it is known.

    Args:
        name: A shipped suite, or a TOML file.
        algos: Only rows of these algorithms (for steering "best_of_n", "smc", "rbf", "d_flow").
        envs: Only these environments.
        seeds: Instead of the suite's.
        budget: Instead of the suite's and its environments'.

    Raises:
        UnknownNameError: An unknown suite, key, algorithm, environment or setting; names the closest.
        ConfigError: Settings without meaning, or a damaged file.
    """
    seeds = list(seeds)
    _expect(budget is None or COUNT[1](budget), "The budget (--budget)", "", COUNT[0], budget)
    _expect(not seeds or SEEDS[1](seeds), "The seeds (--seeds)", "", SEEDS[0], seeds)
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if path.parent == FOLDER and path.stem not in suites():
        raise UnknownNameError.of("suite", path.stem, suites())
    content = _read(path)
    with named_by_a_file(f"The suite file '{path}'", REMEDY):
        cells = _cells(content, list(algos), list(envs), seeds or content["seeds"], budget)
    if not cells:
        raise ConfigError(f"Nothing is left of suite '{path.stem}' with this choice of algorithms and environments.")
    _check_folders(cells)
    return cells


def _read(path: Path) -> dict[str, Any]:
    """Read a suite file; check that every key is known and every value of its type."""
    try:
        data = read_file(path, LARGEST)
        if any(line.count(b".") > MOST_DOTS for line in data.splitlines()):
            raise ConfigError(f"The suite file '{path}' has a line with more than {MOST_DOTS} dots.")
        content = tomllib.loads(data.decode("utf-8-sig"))
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"There is no suite file '{path}'.") from error
    except OSError as error:
        raise ConfigError(f"Cannot read the suite file '{path}': {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, and of numbers with thousands of digits
        raise ConfigError(f"The suite file '{path}' is damaged: {str(error)[:300]}.") from error
    _check_keys(content, SUITE_KEYS, f"suite '{path.stem}'", required=("seeds", "budget", "envs", "rows"))
    for env, about in content["envs"].items():
        _check_keys(about, ENV_KEYS, f"environment '{env[:100]}'")
    for title, row in content["rows"].items():
        where = f"row '{title[:100]}'"
        if len(title) > LONGEST_TITLE or not any(c.isascii() and c.isalnum() for c in title):
            raise ConfigError(
                f"The name of {where} must have a letter or digit, and {LONGEST_TITLE} characters at most."
            )
        _check_keys(row, ROW_KEYS, where)
        for key, settings in row.get("on", {}).items():
            _expect(isinstance(settings, dict), where, f"on.{key[:100]}", "a table", settings)
    return content


def _check_folders(cells: Iterable[Cell]) -> None:
    """Check that no two cells write to the same place, also where a file system ignores case."""
    first: dict[str, Cell] = {}
    for cell in cells:
        other = first.setdefault(cell.folder.lower(), cell)
        if other is not cell:
            raise ConfigError(
                f"'{other.label}' and '{cell.label}' with seed {cell.seed} would write to the same folder, "
                f"{cell.folder}: name one row otherwise, and no seed or value twice."
            )


def _cells(
    content: Mapping[str, Any], algos: list[str], envs: list[str], seeds: list[int], budget: int | None
) -> list[Cell]:
    chosen_envs = _chosen(envs, content["envs"], "environment of this suite")
    _chosen(algos, {_algo_of(row) for row in content["rows"].values()}, "algorithm of this suite")
    points = sum(max(1, *map(len, row.get("sweep", {}).values()), 1) for row in content["rows"].values())
    if (n := points * len(seeds) * len(chosen_envs)) > MOST_CELLS:
        raise ConfigError(
            f"The suite has {n} cells (rows x swept values x environments x seeds); {MOST_CELLS} at most."
        )
    cells = []
    for env in chosen_envs:
        about = content["envs"][env]
        spec = environment_spec(env)
        recommended = spec.recommended(spec.configured(about.get("settings", {})))
        for part in chain.from_iterable(map(parse_mixture, about.get("eval_rewards", []))):
            reward_entry(part.name)  # which raises where there is none
        for title, row in content["rows"].items():
            if (algos and _algo_of(row) not in algos) or env not in row.get("envs", [env]):
                continue
            for values in _swept(row, title):
                made = _cell(content, title, row, env, about, values, 0, budget)
                config = _config(made, recommended)
                cells += [replace(made, seed=seed, config=config) for seed in seeds]
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
    settings = {**_aim(suite.get("target_lambda"), row, settings), **settings}
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
        eval_rewards=about.get("eval_rewards", []),
    )


def _aim(target: float | None, row: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, float]:
    """Give the suite's `target_lambda`, where the row's algorithm has a setting for it that the row leaves open."""
    if target is None or "algo" not in row:
        return {}
    setting = getattr(algorithm_class(row["algo"]), "tilt_setting", None)
    return {} if setting is None or setting[0] in settings or "target_lambda" in settings else {"target_lambda": target}


def _config(cell: Cell, recommended: Mapping[str, Any]) -> dict[str, Any]:
    """Give every setting of the algorithm; check names and values. Nothing is trained or loaded."""
    where = f"Row '{cell.row}' on '{cell.env}'"
    try:
        if cell.steer:
            known = [f.name for f in fields(Steering)]
            for key in cell.steer:
                if key not in known:
                    raise UnknownNameError.of("setting of steering", key, known)
            Steering(**cell.steer)
        cls: type[FlowAlgorithm] = algorithm_class(cell.algo) if cell.algo else FlowAlgorithm
        if not issubclass(cls, FlowAlgorithm):
            raise ConfigError(f"'{cell.algo}' is no FlowAlgorithm.")
        config = cls.configure(None, recommended, cell.settings)
        check_idle(config, cell.settings, recommended)
        return asdict(config)
    except (ConfigError, UnknownNameError) as error:
        raise type(error)(f"{where}: {error}") from error
    except (TypeError, ValueError, ArithmeticError) as error:  # a third party's settings check themselves
        raise ConfigError(f"{where}: the settings have no meaning ({type(error).__name__} {error}).") from error


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


def _check_keys(table: Any, known: Mapping[str, Kind], where: str, required: Iterable[str] = ()) -> None:
    _expect(isinstance(table, dict), f"The {where}", "", "a table", table)
    for key, value in table.items():
        if key not in known:
            raise UnknownNameError.of(f"key in {where}", key, known)
        words, fits = known[key]
        _expect(fits(value), where, key, words, value)
    for key in required:
        if key not in table:
            raise ConfigError(f"The {where} lacks '{key}'.")


def _expect(condition: bool, where: str, key: str, words: str, value: Any) -> None:
    if not condition:
        what = f"'{key}' of {where}" if key else where
        raise ConfigError(f"{what} must be {words}, not {shown(value)}.")
