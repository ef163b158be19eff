"""The training of one or several runs in charts, and their samples: parts of pages about runs."""

from __future__ import annotations

from collections.abc import Sequence

from flowrl.pages import charts
from flowrl.pages.charts import Point, Series, chart
from flowrl.pages.html import escaped, paragraph, picture, player
from flowrl.pages.run_files import Row, RunFiles
from flowrl.runs import pictures
from flowrl.training.records import REWARD

CURVES = {**pictures.CURVES, "train/loss": "loss", "train/grad_norm": "gradient norm"}
"""Metrics that a page draws, and their titles; components of the reward and held-out rewards are added."""
LEFT_OUT = {f"rollout/{key}" for key in ("reward_std", "reward_min", "reward_max", "dropped")}
"""Metrics of the rollouts that are not drawn."""
HELD_OUT = "held_out/"
AXES = {"samples": "samples", "evaluations": "network evaluations", "hours": "hours (by the speed of each row)"}

STYLE = (
    charts.STYLE
    + """
.always { max-width: 31.5rem; }
.axes input { margin: 0 0.2rem 0 0.8rem; } .axes .charts { display: none; margin-top: 0.5rem; }
#by-samples:checked ~ .samples, #by-evaluations:checked ~ .evaluations, #by-hours:checked ~ .hours { display: grid; }
@media print { .axes > input, .axes > label, .axes > span { display: none; } }
"""
)


def training_charts(runs: Sequence[RunFiles]) -> str:
    """Draw all metrics against each axis, one of which is shown, and the path of reward against diversity."""
    keys = _drawn_metrics(runs)
    if not keys:
        return paragraph("There are no metrics yet.")
    choices = "".join(
        f'<input type="radio" name="axis" id="by-{axis}"{" checked" if axis == "samples" else ""}>'
        f'<label for="by-{axis}">{axis}</label>'
        for axis in AXES
    )
    parts = [f'<div class="axes"><span>against</span>{choices}']
    parts += [f'<div class="charts {axis}">{_against(axis, keys, runs)}</div>' for axis in AXES]
    paths = [Series(run.name, _path(run.rows), marks_end=True) for run in runs]
    path = f"<figure>{chart('reward against diversity, to the dot', paths, 'diversity')}</figure>"
    return "".join([*parts, "</div>", f'<div class="charts always">{path}</div>'])


def _drawn_metrics(runs: Sequence[RunFiles]) -> dict[str, str]:
    """Choose the metrics to draw, with their titles."""
    measured = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    components = [  # in "rollout/" where a run was logged by flowrl 0.1
        key
        for key in measured
        if key.startswith(REWARD) or (key.startswith("rollout/") and key not in LEFT_OUT | CURVES.keys())
    ]
    return (
        {key: title for key, title in CURVES.items() if key in measured}
        | {key: key.removeprefix(REWARD).removeprefix("rollout/") for key in components}
        | {key: f"held-out {key.removeprefix(HELD_OUT)}" for key in measured if key.startswith(HELD_OUT)}
    )


def _against(axis: str, keys: dict[str, str], runs: Sequence[RunFiles]) -> str:
    along = [run.along(axis) for run in runs]
    figures = []
    for key, title in keys.items():
        curves = [
            Series(run.name, [(x, row[key]) for x, row in zip(xs, run.rows) if key in row])
            for run, xs in zip(runs, along)
        ]
        figures.append(f"<figure>{chart(title, curves, AXES[axis])}</figure>")
    return "".join(figures)


def _path(rows: Sequence[Row]) -> list[Point]:
    keys = ("rollout/diversity", "rollout/reward_mean")
    return [(row[keys[0]], row[keys[1]]) for row in rows if all(key in row for key in keys)]


def before_after(run: RunFiles) -> str:
    """Show samples of a run before and after training, and let them be heard where they are sounds."""
    shown = paragraph("Reference (left) and trained flow (right), same noise and contexts.") + picture(
        run.before_after, f"samples of {run.name} before and after"
    )
    return shown + "".join(
        f"<figure><figcaption>{escaped(context)}</figcaption>before {player(before)} after {player(after)}</figure>"
        for context, before, after in run.sounds
    )
