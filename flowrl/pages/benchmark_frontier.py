"""The frontier of a benchmark: where the rows of an environment lie in the plane of diversity and reward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flowrl.pages.benchmark_results import Entry
from flowrl.pages.charts import Point

Line = list[Point]


def rows_of(entries: Sequence[Entry]) -> dict[str, int]:
    """Number the rows of all environments, for their colours."""
    return {row: i for i, row in enumerate(dict.fromkeys(entry["row"] for entry in entries))}


def before(entries: Sequence[Entry]) -> Point:
    """Give (diversity, reward) of the flow before training."""
    return entries[0]["reference_diversity"]["mean"], entries[0]["reference_reward_mean"]["mean"]


def frontiers(entries: Sequence[Entry]) -> dict[str, tuple[Line, Line]]:
    """Give (diversity, reward) of each row's settings; and, where a row has one setting only, on the way there."""
    lines = {}
    for row in rows_of(entries):
        mine = [entry for entry in entries if entry["row"] == row]
        curve = mine[0]["curve"] if len(mine) == 1 else []
        ends = [(entry["diversity"]["mean"], entry["reward_mean"]["mean"]) for entry in mine]
        lines[row] = ends, [(point["rollout/diversity"], point["rollout/reward_mean"]) for point in curve]
    return lines


def limits(entries: Sequence[Entry]) -> tuple[Point, Point]:
    """Choose the ranges of diversity and of reward to show."""
    x, y = zip(before(entries), *(point for ends, path in frontiers(entries).values() for point in [*ends, *path]))
    return without_far_out(x), without_far_out(y)


def without_far_out(values: Sequence[float]) -> Point:
    """Give the range of the values without those far out, so that one diverged run does not hide all others.

    Far out is what lies three quartile ranges outside of the quartiles (Tukey). Where none is finite (the diversity of
    contexts that are drawn once each), any range does.
    """
    x = np.array(values, dtype=float)
    x = x[np.isfinite(x)]
    if not len(x):
        return 0.0, 1.0
    low, high = np.percentile(x, (25, 75))
    x = x[(x >= low - 3 * (high - low)) & (x <= high + 3 * (high - low))]
    margin = 0.05 * (x.max() - x.min()) or 0.5
    return float(x.min() - margin), float(x.max() + margin)
