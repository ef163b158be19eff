"""Tables, curves and frontiers of a benchmark's finished cells."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowrl.errors import CheckpointError
from flowrl.runs.folder import finite_or_none
from flowrl.storage.files import LARGEST_JSON, parsed_json, read_file, write_json
from flowrl.suites.suite import Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Entry = dict[str, Any]
AGAIN = "Remove its folder to run that cell again."
THUMBNAIL = 160  # pixels
CURVE_POINTS = 20
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B", "#7F7F7F"),
    *("#BCBD22", "#5D3A9B", "#E31A1C", "#17BECF", "#B15928", "#F781BF"),
)
MARKERS = "osD^v"


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean over seeds, half-width of its 95 % interval (Student's t), and interquartile mean."""
    from scipy import stats

    x = np.array([v for v in values if v is not None], dtype=float)
    if len(x) == 0:
        return {"mean": math.nan, "half_width": math.nan, "iqm": math.nan, "n": 0}
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return {"mean": x.mean(), "half_width": float(half), "iqm": float(stats.trim_mean(x, 0.25)), "n": len(x)}


def collect(cells: Sequence[Cell], root: Path) -> list[Entry]:
    """One entry per row, environment and swept value, over its finished seeds."""
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
    """Cells that differ in nothing but their seed."""
    results = [_read(root / cell.folder / "result.json") for cell in members]
    finished = [result for result in results if result is not None]
    first = members[0]
    entry: Entry = {"env": first.env, "label": first.label, "row": first.row, "swept": first.swept}
    entry |= {"settings": first.settings or first.steer, "seeds_finished": len(finished)}
    entry["seeds_failed"] = sum((root / cell.folder / "error.txt").exists() for cell in members)
    if finished:
        for key in ("reward_mean", "diversity", "drift", "w2_to_optimum", "w2_floor"):
            entry[key] = summary([r[key] for r in finished])
        entry["gain"] = _gain(finished)
        entry["components"] = {k: summary([r["components"][k] for r in finished]) for k in finished[0]["components"]}
        for key in ("reward_mean", "diversity"):
            entry[f"reference_{key}"] = summary([r["reference"][key] for r in finished])
        if unseen := [r["held_out"] for r in finished if "held_out" in r]:
            entry["held_out"] = {"gain": _gain(unseen), "diversity": summary([r["diversity"] for r in unseen])}
        entry["evaluations_per_sample"] = finished[0]["evaluations_per_sample"]
        entry["cost"] = {key: float(np.mean([r["cost"][key] for r in finished])) for key in finished[0]["cost"]}
        entry["curve"] = _curve([_read(root / cell.folder / "curve.json") or [] for cell in members])
        entry["folders"] = [cell.folder for cell, result in zip(members, results) if result is not None]
    return entry


def _gain(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Over the reference at the same noise and contexts."""
    return summary([r["reward_mean"] - r["reference"]["reward_mean"] for r in results])


def _read(path: Path) -> Any:
    """What a finished cell wrote; None where it has not finished."""
    if not path.exists():
        return None
    try:
        return parsed_json(read_file(path, LARGEST_JSON))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The file '{path}' is damaged: {error}. {AGAIN}") from error


def _curve(curves: Sequence[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Mean over seeds, iteration by iteration, as far as all have come."""
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
    """At most `CURVE_POINTS` of its points, the first and the last among them."""
    kept = sorted({round(i) for i in np.linspace(0, len(curve) - 1, CURVE_POINTS)}) if curve else []
    return [curve[i] for i in kept]


def _add_speed(entries: Sequence[Entry]) -> None:
    """Network evaluations until 90 % of the best gain in reward that a method of the environment has come to.

    All from the curves of training, averaged over three iterations; they start with the mean of all first iterations.
    """
    for env in {entry["env"] for entry in entries}:
        curves = [(e, _smoothed(e["curve"])) for e in entries if e["env"] == env and e.get("curve")]
        if not curves:
            continue
        start = float(np.mean([e["curve"][0]["rollout/reward_mean"] for e, _ in curves]))
        goal = start + 0.9 * (max(reward for _, curve in curves for _, reward in curve) - start)
        for entry, curve in curves:
            entry["evaluations_to_90_percent"] = next((spent for spent, reward in curve if reward >= goal), None)


def _smoothed(curve: Sequence[dict[str, float]]) -> list[tuple[float, float]]:
    """Evaluations, and the mean reward of an iteration and the two before it."""
    rewards = [point["rollout/reward_mean"] for point in curve]
    return [(p["evaluations"], float(np.mean(rewards[max(0, i - 2) : i + 1]))) for i, p in enumerate(curve)]


def markdown(entries: Sequence[Entry]) -> str:
    """One table per environment."""
    parts = []
    for env in dict.fromkeys(entry["env"] for entry in entries):
        here = [entry for entry in entries if entry["env"] == env]
        done = [entry for entry in here if entry["seeds_finished"]]
        if not done:
            parts.append(f"### {env}\n\nNo cell has finished.\n")
            continue
        exact = not math.isnan(done[0]["w2_to_optimum"]["mean"])
        reference = done[0]["reference_reward_mean"]["mean"], done[0]["reference_diversity"]["mean"]
        unseen = "held_out" in done[0]
        head = ["algorithm", "reward", "gain", "IQM", "diversity", "drift", *(["W2 to optimum"] if exact else [])]
        head += ["gain, held-out prompts", "diversity of these"] if unseen else []
        head += [*done[0]["components"], "network evaluations", "to 90 %", "then per sample"]
        head += ["samples", "updates", "minutes", "seeds"]
        lines = [f"### {env}", "", f"Before training: reward {reference[0]:.3g}, diversity {reference[1]:.3g}."]
        if exact:
            lines[-1] += f" W2 of exact samples against each other: {done[0]['w2_floor']['mean']:.3g}."
        lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(_row(entry, exact, done[0])) + " |" for entry in here]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _row(entry: Entry, exact: bool, example: Entry) -> list[str]:
    if not entry["seeds_finished"]:
        return [entry["label"], f"failed ({entry['seeds_failed']} seeds)"]
    cost = entry["cost"]
    cells = [entry["label"], _interval(entry["reward_mean"]), _interval(entry["gain"])]
    cells.append(f"{entry['reward_mean']['iqm']:.3g}")
    cells += [_interval(entry["diversity"]), _drift(entry)]
    cells += [_interval(entry["w2_to_optimum"])] if exact else []
    if "held_out" in example:
        cells += [_interval(entry["held_out"][key]) if "held_out" in entry else "" for key in ("gain", "diversity")]
    cells += [f"{entry['components'][key]['mean']:.3g}" for key in example["components"]]
    to_90 = entry.get("evaluations_to_90_percent")
    cells.append(f"{cost['network_evaluations']:.2g}")
    cells.append("" if to_90 is None else f"{to_90:.2g}")
    cells.append(f"{entry['evaluations_per_sample']:.0f}")
    cells += [f"{cost['samples']:.0f}", f"{cost['gradient_steps']:.0f}", f"{cost['training_seconds'] / 60:.1f}"]
    return [*cells, str(entry["seeds_finished"])]


def _drift(entry: Entry) -> str:
    """Mean over seeds; of a trained flow that ran off it is not finite, and missing."""
    n, seeds = entry["drift"]["n"], entry["seeds_finished"]
    text = _number(entry["drift"]["mean"], 2)
    if entry["cost"]["gradient_steps"] and n < seeds:
        text = f"{text} (finite in {n} of {seeds})".strip()
    return text


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}g}"


def _interval(values: dict[str, float]) -> str:
    half = values["half_width"]
    return f"{values['mean']:.3g}" + ("" if math.isnan(half) else f" ± {half:.2g}")


def colours(entries: Sequence[Entry]) -> dict[str, str]:
    """A colour for each row."""
    rows = dict.fromkeys(entry["row"] for entry in entries)
    return {row: COLOURS[i % len(COLOURS)] for i, row in enumerate(rows)}


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Range of the values without those far out (Tukey: three quartile ranges): one diverged run must not hide all."""
    x = np.array(values, dtype=float)
    x = x[np.isfinite(x)]
    low, high = np.percentile(x, (25, 75))
    x = x[(x >= low - 3 * (high - low)) & (x <= high + 3 * (high - low))]
    margin = 0.05 * (x.max() - x.min()) or 0.5
    return float(x.min() - margin), float(x.max() + margin)


def _legend(figure: Figure) -> None:
    """One legend beside all axes, each row once."""
    handles = {str(label): handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)


def learning_curves(entries: Sequence[Entry]) -> Figure:
    """Reward and diversity of the rollouts against network evaluations, per environment."""
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
                axes.set_ylim(*_limits([p[key] for entry in trained for p in entry["curve"]]))
            axes.grid(alpha=0.3)
    _legend(figure)
    return figure


def frontier(entries: Sequence[Entry]) -> Figure:
    """Reward against diversity, per environment: the values of a sweep joined, or the training of a single setting."""
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
        for row, (ends, path) in _frontiers(done).items():
            axes.plot(*zip(*ends), color=colour[row], label=row, marker=marker[row], markersize=4, linewidth=1)
            if path:
                axes.plot(*zip(*path), ":", color=colour[row], linewidth=1)
        axes.plot(*_before(done), "k*", markersize=11, label="before training")
        across, up = _frontier_limits(done)
        axes.set(xlim=across, ylim=up)
    _legend(figure)
    return figure


Point = tuple[float, float]


def _before(entries: Sequence[Entry]) -> Point:
    """(diversity, reward) of the flow before training."""
    return entries[0]["reference_diversity"]["mean"], entries[0]["reference_reward_mean"]["mean"]


def _frontiers(entries: Sequence[Entry]) -> dict[str, tuple[list[Point], list[Point]]]:
    """What `_frontier_of` says of each row."""
    rows = dict.fromkeys(entry["row"] for entry in entries)
    return {row: _frontier_of([entry for entry in entries if entry["row"] == row]) for row in rows}


def _frontier_limits(entries: Sequence[Entry]) -> tuple[Point, Point]:
    """Ranges of diversity and of reward that are shown."""
    x, y = zip(_before(entries), *(p for ends, path in _frontiers(entries).values() for p in [*ends, *path]))
    return _limits(x), _limits(y)


def _frontier_of(entries: Sequence[Entry]) -> tuple[list[Point], list[Point]]:
    """(diversity, reward) of one row's settings; and, where it has only one, on the way of its training."""
    ends = [(e["diversity"]["mean"], e["reward_mean"]["mean"]) for e in entries]
    curve = entries[0]["curve"] if len(entries) == 1 else []
    return ends, [(p["rollout/diversity"], p["rollout/reward_mean"]) for p in curve]


def _thumbnail(path: Path) -> str:
    """A picture as a small JPEG in base64: a page may hold hundreds."""
    from PIL import Image

    picture, data = Image.open(path).convert("RGB"), io.BytesIO()
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(data, "JPEG", quality=50)
    return base64.b64encode(data.getvalue()).decode()


def _points(entries: Sequence[Entry], root: Path) -> str:
    """The frontier of one environment as SVG; every point shows its settings and samples when pointed at."""
    colour = colours(entries)
    done = [entry for entry in entries if entry["seeds_finished"]]
    (left, right), (bottom, top) = _frontier_limits(done)
    width, height, margin = 760, 460, 50

    def place(x: float, y: float) -> Point:
        across = (min(max(x, left), right) - left) / (right - left)
        up = (min(max(y, bottom), top) - bottom) / (top - bottom)
        return margin + across * (width - 2 * margin), height - margin - up * (height - 2 * margin)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="reward against diversity">']
    parts.append(f'<text x="{width / 2}" y="{height - 8}" class="axis">diversity {left:.3g} to {right:.3g}</text>')
    parts.append(f'<text x="12" y="24" class="left">reward {bottom:.3g} to {top:.3g}</text>')
    for row, (ends, path) in _frontiers(done).items():
        for line, style in ((ends, ""), (path, ' stroke-dasharray="2 3"')):
            if len(line) < 2:
                continue
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
            drawn = f'fill="none" stroke="{colour[row]}" stroke-opacity="0.5"{style}'
            parts.append(f'<polyline points="{points}" {drawn}/>')
    x, y = place(*_before(done))
    parts.append(f'<text x="{x:.1f}" y="{y:.1f}" class="axis">★<title>before training</title></text>')
    for entry in done:
        x, y = place(entry["diversity"]["mean"], entry["reward_mean"]["mean"])
        told = f"{entry['label']}\nreward {_interval(entry['reward_mean'])}, diversity {_interval(entry['diversity'])}"
        told += f", drift {_number(entry['drift']['mean'], 2)}\nsettings: {json.dumps(entry['settings'])}"
        picture = _thumbnail(root / entry["folders"][0] / "samples.png")
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{colour[entry["row"]]}" tabindex="0" '
            f'data-told="{html.escape(told)}" data-picture="{picture}"><title>{html.escape(told)}</title></circle>'
        )
    return "\n".join([*parts, "</svg>"])


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
svg {{ width: 100%; max-width: 760px; border: 1px solid #ccc; background: white; }}
circle {{ cursor: pointer; }} circle:hover, circle:focus {{ stroke: black; stroke-width: 2; }}
.axis {{ text-anchor: middle; font-size: 13px; }} .left {{ font-size: 13px; }}
#shown {{ position: fixed; right: 1rem; top: 1rem; width: 19rem; background: white; color: black;
  border: 1px solid #888; padding: .6rem; white-space: pre-wrap; font-size: 13px; }}
#shown img {{ width: 100%; }} .key span {{ margin-right: 1rem; white-space: nowrap; }}
</style></head><body>
<h1>{title}</h1>
<p>Each point is an algorithm at one setting, the mean over its seeds; lines join the values of a sweep, dotted ones
show the training of a single setting. Point at one to see its settings and samples. What lies far out is put on the
border.</p>
<p class="key">{key}</p>
{body}
<div id="shown">no point chosen</div>
<script>
const shown = document.getElementById("shown");
for (const point of document.querySelectorAll("circle")) {{
  const show = () => {{
    shown.textContent = point.dataset.told;
    const image = document.createElement("img");
    image.src = "data:image/jpeg;base64," + point.dataset.picture;
    shown.append(image);
  }};
  point.addEventListener("mouseenter", show);
  point.addEventListener("focus", show);
}}
</script>
</body></html>
"""


def page(entries: Sequence[Entry], root: Path) -> str:
    """The frontier as a self-contained HTML page."""
    key = "".join(
        f'<span style="color:{colour}">&#9679;</span><span>{html.escape(row)}</span>'
        for row, colour in colours(entries).items()
    )
    body = []
    for env in dict.fromkeys(entry["env"] for entry in entries):
        here = [entry for entry in entries if entry["env"] == env]
        if any(entry["seeds_finished"] for entry in here):
            body.append(f"<h2>{html.escape(env)}</h2>\n{_points(here, root)}")
    return PAGE.format(title=f"Benchmark {html.escape(root.name)}", key=key, body="\n".join(body))


def _rounded(value: Any) -> Any:
    """All numbers in it to six digits."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def save_drawing(figure: Figure, path: Path, dpi: int) -> None:
    """As PNG of 128 colours: drawings need no more, and take a third of the space."""
    from PIL import Image

    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    Image.open(stream).convert("RGB").quantize(128).save(path, optimize=True)


def write_comparison(cells: Sequence[Cell], root: Path) -> list[Path]:
    """Write results.json, table.md, curves.png, frontier.png and frontier.html into `root`; returns their paths."""
    entries = collect(cells, root)
    paths = [root / name for name in ("results.json", "table.md", "curves.png", "frontier.png", "frontier.html")]
    write_json(paths[0], _rounded(finite_or_none(entries)))
    paths[1].write_text(markdown(entries))
    save_drawing(learning_curves(entries), paths[2], dpi=80)
    save_drawing(frontier(entries), paths[3], dpi=110)
    paths[4].write_text(page(entries, root), encoding="utf-8")
    return paths
