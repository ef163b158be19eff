"""The plots of a benchmark as PNG: learning curves, and the frontier of reward and diversity."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.pages.benchmark_frontier import before, frontiers, limits, rows_of, without_far_out
from flowrl.pages.benchmark_results import Entry
from flowrl.pages.charts import COLOURS
from flowrl.storage.files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vPX"  # their number and that of the colours have no common divisor: pairs repeat late
MOST_PATHS = 12
"""Rows of an environment whose trainings are drawn; more are not told apart."""


def colours(entries: Sequence[Entry]) -> dict[str, str]:
    """Choose a colour for each row."""
    return {row: COLOURS[i % len(COLOURS)] for row, i in rows_of(entries).items()}


def _legend(figure: Figure) -> None:
    """Put one legend beside all axes, with each row once."""
    handles = {str(label): handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)


def learning_curves(entries: Sequence[Entry]) -> Figure:
    """Draw reward and diversity of the rollouts against network evaluations, per environment."""
    from matplotlib.figure import Figure

    envs, colour = list(dict.fromkeys(entry["env"] for entry in entries)), colours(entries)
    figure = Figure(figsize=(13, 3.6 * len(envs)), layout="constrained")
    for i, env in enumerate(envs):
        trained = [entry for entry in entries if entry["env"] == env and entry.get("curve")]
        for j, (key, title) in enumerate((("rollout/reward_mean", "reward"), ("rollout/diversity", "diversity"))):
            axes = figure.add_subplot(len(envs), 2, 2 * i + j + 1)
            for entry in trained:
                x, y = zip(*((p["evaluations"], p[key]) for p in entry["curve"]))
                axes.plot(x, y, color=colour[entry["row"]], label=entry["row"], linewidth=1.2, alpha=0.8)
            axes.set(title=f"{env}: {title} of the rollouts", xlabel="network evaluations")
            if trained:
                axes.set_ylim(*without_far_out([p[key] for entry in trained for p in entry["curve"]]))
            axes.grid(alpha=0.3)
    _legend(figure)
    return figure


def frontier(entries: Sequence[Entry]) -> Figure:
    """Draw reward against diversity, per environment: the values of a sweep joined, or a single setting's training.

    The trainings are left out where there are more than `MOST_PATHS` rows.
    """
    from matplotlib.figure import Figure

    envs, colour = list(dict.fromkeys(entry["env"] for entry in entries)), colours(entries)
    marker = {row: MARKERS[i % len(MARKERS)] for i, row in enumerate(colour)}
    figure = Figure(figsize=(9, 4.4 * len(envs)), layout="constrained")
    for i, env in enumerate(envs):
        axes = figure.add_subplot(len(envs), 1, i + 1)
        axes.set(title=env, xlabel="diversity", ylabel="reward")
        axes.grid(alpha=0.3)
        done = [entry for entry in entries if entry["env"] == env and entry["seeds_finished"]]
        if not done:
            continue
        for row, (ends, path) in frontiers(done).items():
            axes.plot(*zip(*ends), color=colour[row], label=row, marker=marker[row], markersize=4, linewidth=1)
            if path and len(rows_of(done)) <= MOST_PATHS:
                axes.plot(*zip(*path), ":", color=colour[row], linewidth=1)
        axes.plot(*before(done), "k*", markersize=11, label="before training")
        across, up = limits(done)
        axes.set(xlim=across, ylim=up)
    _legend(figure)
    return figure


def save_drawing(figure: Figure, path: Path, dpi: int) -> None:
    """Save as PNG of 128 colours: drawings need no more, and take a third of the space."""
    from PIL import Image

    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    with written_whole(path) as new:
        Image.open(stream).convert("RGB").quantize(128).save(new, optimize=True)
