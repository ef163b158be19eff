"""Cells of a suite that have finished before: which need not be run again, and which belong into the suite's tables."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from flowrl.errors import CheckpointError, ConfigError, FlowRLError
from flowrl.registry import algorithm_class
from flowrl.runs.folder import finite_or_none
from flowrl.storage.files import read_json
from flowrl.suites.suite import AGAIN, Cell, load_suite
from flowrl.training.algorithm import FlowAlgorithm


def finished_before(cell: Cell, root: Path) -> bool:
    """Tell whether a cell has been finished, with the same settings.

    A setting that an older version did not have counts as the same where it has its default.

    Raises:
        ConfigError: It was finished with other settings.
        CheckpointError: Its result is damaged.
    """
    path, shown = root / cell.folder / "result.json", reprlib.Repr().repr
    if not path.exists():
        return False
    try:
        old, new = read_json(path).get("cell"), _as_stored(cell.to_dict())
    except CheckpointError as error:
        raise CheckpointError(f"{error} {AGAIN}") from error
    if not (isinstance(old, dict) and isinstance(old.get("config", {}), dict)):
        raise ConfigError(f"'{path}' says of no cell that it has finished. Remove that folder to run the cell again.")
    old, new = ({**made.pop("config", {}), **made} for made in (old, new))
    old = {"eval_rewards": [], **{key: value for key, value in _defaults(cell).items() if key in new}, **old}
    if isinstance(old.get("compile"), bool):  # as of version 0.1.0
        old["compile"] = "blocks" if old["compile"] else "off"
    odd = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    changed = [f"{key[:100]} {shown(old.get(key))}, not {shown(new.get(key))}" for key in odd[:20]]
    if changed:
        raise ConfigError(
            f"'{path.parent}' was finished with other settings ({'; '.join(changed)}). Choose another folder with "
            "--out, or remove that one to run the cell again."
        )
    return True


def with_others(chosen: Sequence[Cell], root: Path, suite: str, budget: int | None = None) -> tuple[list[Cell], str]:
    """Add the cells of the whole suite that were run there before to those chosen; in the suite's order.

    Args:
        chosen: What is run now.
        root: The suite's folder of results.
        suite: Name or file of the suite.
        budget: Instead of the suite's.

    Returns:
        The cells that tables are of, and why others that stand in that folder are not among them; empty if none are.
    """
    there = [path.parent for path in root.glob("cells/*/*/seed-*/*") if path.name in ("result.json", "error.txt")]
    own = {root / cell.folder for cell in chosen}
    if not (others := set(there) - own):
        return list(chosen), ""
    seeds = {cell.seed for cell in chosen} | {int(n) for path in others if (n := path.name[5:]).isdecimal()}
    try:
        whole = load_suite(suite, seeds=sorted(seeds), budget=budget)
    except FlowRLError as error:  # rows that are not chosen may need code that is not named now
        return list(chosen), f"{len(others)} other cells that were run before: {error}"
    cells, left_out = [], []
    for cell in whole:
        folder = root / cell.folder
        try:
            if folder in others:
                finished_before(cell, root)  # raises where the settings were others
            if folder in own | others:
                cells.append(cell)
        except FlowRLError as error:
            left_out.append(str(error))
    gone = sorted(folder for folder in others - {root / c.folder for c in whole} if (folder / "result.json").exists())
    left_out += [f"'{folder}' is of a row, an environment or a value that the suite no longer has" for folder in gone]
    more = f" ({len(left_out) - 1} more like it)" if len(left_out) > 1 else ""
    return cells, f"{left_out[0]}{more}" if left_out else ""


def _as_stored(values: dict[str, Any]) -> dict[str, Any]:
    """Give values as JSON holds them."""
    stored: dict[str, Any] = json.loads(json.dumps(finite_or_none(values)))
    return stored


def _defaults(cell: Cell) -> dict[str, Any]:
    """Give the defaults of the settings of a cell's algorithm, as JSON holds them."""
    cls: type[FlowAlgorithm] = algorithm_class(cell.algo) if cell.algo else FlowAlgorithm
    return _as_stored({f.name: f.default for f in fields(cls.Config) if f.default is not MISSING})
