"""The results of a benchmark: one entry per row, environment and swept value, over its finished seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowrl.checks import in_all
from flowrl.errors import CheckpointError
from flowrl.storage.files import LARGEST_JSON, parsed_json, read_file
from flowrl.suites.suite import AGAIN, Cell

Entry = dict[str, Any]
CURVE_POINTS = 20


def summary(values: Sequence[float]) -> dict[str, float]:
    """Compute the mean over seeds, the half-width of its 95 % interval (Student's t), and the interquartile mean."""
    from scipy import stats

    x = np.array([v for v in values if v is not None], dtype=float)
    if len(x) == 0:
        return {"mean": math.nan, "half_width": math.nan, "iqm": math.nan, "n": 0}
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return {"mean": x.mean(), "half_width": float(half), "iqm": float(stats.trim_mean(x, 0.25)), "n": len(x)}


def collect(cells: Sequence[Cell], root: Path) -> list[Entry]:
    """Read the results of all cells into entries.

    Raises:
        CheckpointError: A result is damaged.
    """
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.env, cell.label), []).append(cell)
    entries = []
    for members in groups.values():
        try:
            entries.append(_entry(members, root))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            folders = ", ".join(cell.folder for cell in members)
            raise CheckpointError(
                f"A result in '{root}' is damaged ({type(error).__name__} {error}), in one of {folders}. {AGAIN}"
            ) from error
    try:
        _add_speed(entries)
        for entry in entries:
            entry["curve"] = _thinned(entry.get("curve", []))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"A curve in '{root}' is damaged ({type(error).__name__} {error}). {AGAIN}") from error
    return entries


def _entry(members: Sequence[Cell], root: Path) -> Entry:
    """Join cells that differ in nothing but their seed."""
    results = [_read(root / cell.folder / "result.json") for cell in members]
    finished = [result for result in results if result is not None]
    first = members[0]
    entry: Entry = {"env": first.env, "label": first.label, "row": first.row, "swept": first.swept}
    entry |= {"settings": first.settings or first.steer, "seeds_finished": len(finished)}
    without = [root / cell.folder for cell, result in zip(members, results) if result is None]
    entry["seeds_failed"] = sum((folder / "error.txt").exists() for folder in without)
    if finished:
        for key in ("reward_mean", "diversity", "drift", "w2_to_optimum", "w2_floor"):
            entry[key] = summary([r[key] for r in finished])
        entry["gain"] = _gain(finished)
        named = [r["components"] for r in finished]
        entry["components"] = {name: summary([part[name] for part in named]) for name in in_all(named)}
        for key in ("reward_mean", "diversity"):
            entry[f"reference_{key}"] = summary([r["reference"][key] for r in finished])
        if unseen := [r["held_out"] for r in finished if "held_out" in r]:
            entry["held_out"] = {"gain": _gain(unseen), "diversity": summary([r["diversity"] for r in unseen])}
        if first.eval_rewards:
            entry["eval_rewards"] = {name: _change(finished, f"held-out {name}") for name in first.eval_rewards}
        entry["evaluations_per_sample"] = finished[0]["evaluations_per_sample"]
        entry["cost"] = {key: float(np.mean([r["cost"][key] for r in finished])) for key in finished[0]["cost"]}
        folders = [cell.folder for cell, result in zip(members, results) if result is not None]
        curves = [_read(root / folder / "curve.json") or [] for folder in folders]
        entry["target_lambda"] = summary([curve[-1].get("rollout/target_lambda") for curve in curves if curve])["mean"]
        entry["curve"] = _curve(curves)
        entry["folders"] = folders
    return entry


def _gain(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Compute the gain over the reference at the same noise and contexts."""
    return summary([r["reward_mean"] - r["reference"]["reward_mean"] for r in results])


def _change(results: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """Compute the change of what is measured beside the reward, as `_gain`."""
    return summary([r["side"][name] - r["reference"]["side"][name] for r in results])


def _read(path: Path) -> Any:
    """Read a file of a finished cell; None where it has not finished."""
    if not path.exists():
        return None
    try:
        return parsed_json(read_file(path, LARGEST_JSON))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The file '{path}' is damaged: {error}. {AGAIN}") from error


def _curve(curves: Sequence[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Average over seeds, iteration by iteration, as far as all have come."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return []
    keys = ("evaluations", "seconds", "rollout/reward_mean", "rollout/diversity", "train/drift")
    shortest = min(map(len, curves))
    return [
        {key: float(np.mean([curve[i][key] for curve in curves])) for key in keys if key in curves[0][i]}
        for i in range(shortest)
    ]


def _thinned(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    """Keep at most `CURVE_POINTS` points, the first and the last among them."""
    kept = sorted({round(i) for i in np.linspace(0, len(curve) - 1, CURVE_POINTS)}) if curve else []
    return [curve[i] for i in kept]


def _add_speed(entries: Sequence[Entry]) -> None:
    """Add the network evaluations until 90 % of the best gain in reward that a method of the environment has come to.

    Gains are those of the curves of training, averaged over three iterations, above the mean of all first iterations.
    Methods that ask for no reward in training (given pairs) have none, nor have those that gained nothing in the end.
    """
    for env in {entry["env"] for entry in entries}:
        trained = [e for e in entries if e["env"] == env and e.get("curve")]
        curves = [(e, _smoothed(e["curve"])) for e in trained if not math.isnan(e["curve"][0]["rollout/reward_mean"])]
        if not curves:
            continue
        start = float(np.mean([e["curve"][0]["rollout/reward_mean"] for e, _ in curves]))
        goal = start + 0.9 * (max(reward for _, curve in curves for _, reward in curve) - start)
        for entry, curve in curves:
            gained = entry["reward_mean"]["mean"] > entry["reference_reward_mean"]["mean"]
            reached = (spent for spent, reward in curve if gained and reward >= goal > start)
            entry["evaluations_to_90_percent"] = next(reached, None)


def _smoothed(curve: Sequence[dict[str, float]]) -> list[tuple[float, float]]:
    """Pair evaluations with the mean reward of an iteration and the two before it."""
    rewards = [point["rollout/reward_mean"] for point in curve]
    return [(p["evaluations"], float(np.mean(rewards[max(0, i - 2) : i + 1]))) for i, p in enumerate(curve)]


def to_six_digits(value: Any) -> Any:
    """Round all numbers in it to six digits."""
    if isinstance(value, dict):
        return {key: to_six_digits(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [to_six_digits(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
