"""Pages about runs: `report.html` of a run folder, and `python -m flowrl.report RUN RUN ...`, which compares runs.

A page is one file that loads nothing: it can be sent, printed and read on a phone.
"""

from __future__ import annotations

import base64
import html
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from flowrl.errors import CheckpointError, ConfigError, FlowRLError
from flowrl.pages import charts
from flowrl.pages.charts import Series, chart, legend
from flowrl.registry import ALGORITHMS
from flowrl.runs import pictures
from flowrl.runs.logs import WARNINGS, read_metrics
from flowrl.runs.pictures import STEPS
from flowrl.storage.files import read_json
from flowrl.training.loading import DAMAGE

PROGRAM = "python -m flowrl.report"
CURVES = {**pictures.CURVES, "train/loss": "loss", "train/grad_norm": "gradient norm"}
"""Metrics that a page draws, and their titles; components of the reward and held-out rewards are added."""
HELD_OUT = "held_out/"

Row = dict[str, float]


@dataclass(frozen=True)
class RunFiles:
    """What a run folder says of a run.

    Attributes:
        name: Of the folder.
        config: `config.json`.
        rows: `metrics.csv`.
        evaluation: `evaluation{tag}.json`; empty when there is none.
        before_after: The picture of samples, PNG; empty when there is none.
        warnings: What training warned of.
    """

    name: str
    config: dict[str, Any]
    rows: list[Row]
    evaluation: dict[str, Any]
    before_after: bytes
    warnings: list[str]

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
            warnings.read_text().splitlines() if warnings.exists() else [],
        )

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
        return given | {f"env.{key}": value for key, value in _environment(self.config).get("settings", {}).items()}

    def along(self, axis: str) -> list[float]:
        """Where the rows lie on an axis: samples, network evaluations, or hours of training."""
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


AXES = {"samples": "samples", "evaluations": "network evaluations", "hours": "hours (by the speed of each row)"}


def _environment(config: Mapping[str, Any]) -> dict[str, Any]:
    return config.get("environment") or {}


def write_report(folder: Path, tag: str = "") -> Path:
    """Write `report{tag}.html` of a run: what it was, what came out, curves, pictures, settings.

    Args:
        folder: Run folder.
        tag: End of the names of `evaluation{tag}.json` and `before_after{tag}.png`: an evaluation beside the run's own.

    Raises:
        ConfigError: It is no run folder.
    """
    path = folder / f"report{tag}.html"
    path.write_text(_made(page, RunFiles.read(folder, tag)), encoding="utf-8")
    return path


def _made(make: Callable[[Any], str], what: Any) -> str:
    """`make(what)`; an error where the files hold something else than a run writes."""
    try:
        return make(what)
    except DAMAGE as error:
        raise ConfigError(f"config.json, metrics.csv or evaluation.json is damaged: {error}.") from error


def page(run: RunFiles) -> str:
    """The page of one run."""
    config, evaluation = run.config, run.evaluation
    settings = ", ".join(f"{key} = {_shown(value)}" for key, value in run.settings.items()) or "all as they are"
    last = run.rows[-1] if run.rows else {}
    hours = run.along("hours")[-1] if run.rows else math.nan
    facts = [
        ("algorithm", config.get("algorithm")),
        ("environment", _environment(config).get("name", "an object")),
        ("flow", config.get("flow") or "from a factory"),
        ("settings that differ from the algorithm's defaults", settings),
        ("seed", config.get("seed")),
        ("device", config.get("device")),
        ("samples", _count(last.get(STEPS))),
        ("network evaluations", _count(last.get("time/network_evaluations"))),
        ("training time", _duration(hours)),
        ("flowrl", config.get("flowrl")),
    ]
    warnings = [*run.warnings, *evaluation.get("warnings", ())]
    body = [
        f"<h1>{html.escape(run.name)}</h1>",
        _table([(html.escape(str(key)), html.escape(str(value))) for key, value in facts]),
        _warnings(warnings),
        *([f"<h2>Result</h2>{_result(evaluation)}"] if evaluation else []),
        *([_before_after(run)] if run.before_after else []),
        "<h2>Training</h2>",
        _curves([run]),
        _prompts(evaluation),
        f"<details><summary>config.json</summary><pre>{html.escape(json.dumps(config, indent=1))}</pre></details>",
    ]
    return _html(run.name, body)


def comparison_page(runs: Sequence[RunFiles]) -> str:
    """The page that compares runs."""
    names = [run.name for run in runs]
    body = [
        f"<h1>{len(runs)} runs</h1>",
        legend(names),
        _overview(runs),
        "<h2>Training</h2>",
        _curves(runs),
        *(f"<h3>{html.escape(run.name)}</h3>{_before_after(run, 3)}" for run in runs if run.before_after),
    ]
    return _html(f"{len(runs)} runs", body)


def _overview(runs: Sequence[RunFiles]) -> str:
    """A row per run: its settings where they differ, and what came out."""
    settings = []
    for run in runs:
        what = {"algorithm": run.config.get("algorithm"), "environment": _environment(run.config).get("name")}
        settings.append({**what, **run.settings, "seed": run.config.get("seed")})
    all_keys = dict.fromkeys(key for setting in settings for key in setting)
    keys = [key for key in all_keys if len({str(setting.get(key)) for setting in settings}) > 1]
    head = ["run", *keys, "reward before", "after", "95 % interval"]
    head += ["diversity before", "after", "drift", "network evaluations"]
    rows = []
    for run, setting in zip(runs, settings):
        e = run.evaluation
        before = e.get("reference") or {}
        low, high = e.get("reward_ci") or (None, None)
        last = run.rows[-1] if run.rows else {}
        cells = [run.name, *(_shown(setting.get(key, "")) for key in keys)]
        cells += [_number(before.get("reward_mean")), _number(e.get("reward_mean"))]
        cells += [f"{_number(low)} to {_number(high)}", _number(before.get("diversity")), _number(e.get("diversity"))]
        cells += [_number(e.get("drift")), _count(last.get("time/network_evaluations"))]
        rows.append(tuple(html.escape(str(cell)) for cell in cells))
    return _table(rows, head)


def _result(evaluation: Mapping[str, Any]) -> str:
    """Reference, trained and change of every figure of an evaluation."""
    before = evaluation.get("reference") or {}
    pairs = [("reward", before.get("reward_mean"), evaluation.get("reward_mean"))]
    for part in ("components", "side"):
        old, new = before.get(part) or {}, evaluation.get(part) or {}
        pairs += [(key, old.get(key), value) for key, value in new.items()]
        if part == "components":
            pairs.append(("diversity", before.get("diversity"), evaluation.get("diversity")))
    if evaluation.get("w2_to_optimum") is not None:
        pairs.append(("W2 to optimum", before.get("w2_to_optimum"), evaluation["w2_to_optimum"]))
    rows = [
        (html.escape(name), _number(a), _number(b), f"{b - a:+.4g}" if a is not None and b is not None else "")
        for name, a, b in pairs
    ]
    low, high = evaluation.get("reward_ci") or (None, None)
    notes = [
        f"Reward of the trained flow, 95 % interval: {_number(low)} to {_number(high)} "
        f"({_count(evaluation.get('n_samples'))} samples).",
        f"Drift E|v - v_ref|\u00b2: {_number(evaluation.get('drift'))}; "
        f"effective sample share: {_number(evaluation.get('ess'))}.",
    ]
    if evaluation.get("n_prompts"):
        notes.append(f"prompts: {evaluation.get('prompts')} ({evaluation['n_prompts']})")
    if evaluation.get("w2_floor") is not None:
        notes.append(f"W2 of exact samples against each other: {_number(evaluation['w2_floor'])}.")
    return _table(rows, ["", "reference", "trained", "change"]) + "".join(f"<p>{html.escape(n)}</p>" for n in notes)


def _prompts(evaluation: Mapping[str, Any]) -> str:
    """Mean reward of each prompt, in a part that opens; the largest changes first."""
    found = evaluation.get("per_prompt") or []
    if not found:
        return ""
    ordered = sorted(found, key=lambda row: row["reference"] - row["trained"])
    rows = [
        (
            html.escape(str(row["prompt"])),
            str(row["n"]),
            _number(row["reference"]),
            _number(row["trained"]),
            f"{row['trained'] - row['reference']:+.4g}",
        )
        for row in ordered
    ]
    table = _table(rows, ["prompt", "samples", "reference", "trained", "change"])
    return f"<details><summary>Reward by prompt ({len(rows)})</summary>{table}</details>"


def _curves(runs: Sequence[RunFiles]) -> str:
    """All curves against each axis, of which one is shown, and the path of reward against diversity."""
    measured = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    components = [key for key in measured if key.startswith("rollout/") and key not in KNOWN | CURVES.keys()]
    keys = {key: title for key, title in CURVES.items() if key in measured}
    keys |= {key: key.removeprefix("rollout/") for key in components}
    keys |= {key: f"held-out {key.removeprefix(HELD_OUT)}" for key in measured if key.startswith(HELD_OUT)}
    if not keys:
        return "<p>There are no metrics yet.</p>"
    choices = "".join(
        f'<input type="radio" name="axis" id="by-{axis}"{" checked" if axis == "samples" else ""}>'
        f'<label for="by-{axis}">{axis}</label>'
        for axis in AXES
    )
    parts = [f'<div class="axes"><span>against</span>{choices}']
    for axis, xlabel in AXES.items():
        along = [run.along(axis) for run in runs]
        figures = []
        for key, title in keys.items():
            curves = [
                Series(run.name, [(x, row[key]) for x, row in zip(xs, run.rows) if key in row])
                for run, xs in zip(runs, along)
            ]
            figures.append(f"<figure>{chart(title, curves, xlabel)}</figure>")
        parts.append(f'<div class="charts {axis}">{"".join(figures)}</div>')
    paths = [Series(run.name, _path(run.rows), marks_end=True) for run in runs]
    path = f"<figure>{chart('reward against diversity, to the dot', paths, 'diversity')}</figure>"
    return "".join([*parts, "</div>", f'<div class="charts always">{path}</div>'])


KNOWN = {f"rollout/{key}" for key in ("reward_std", "reward_min", "reward_max", "dropped")}
"""Metrics that are not drawn."""


def _path(rows: Sequence[Row]) -> list[tuple[float, float]]:
    keys = ("rollout/diversity", "rollout/reward_mean")
    return [(row[keys[0]], row[keys[1]]) for row in rows if all(key in row for key in keys)]


def _before_after(run: RunFiles, level: int = 2) -> str:
    data = base64.b64encode(run.before_after).decode()
    head = "<h2>Before and after</h2>" if level == 2 else ""
    return (
        f"{head}<p>Reference (left) and trained flow (right), same noise and contexts.</p>"
        f'<img alt="samples of {html.escape(run.name)} before and after" src="data:image/png;base64,{data}">'
    )


def _warnings(texts: Sequence[str]) -> str:
    if not texts:
        return ""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in dict.fromkeys(texts))
    return f'<section class="warnings"><h2>Warnings</h2><ul>{items}</ul></section>'


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table of cells that are HTML already, in a part that scrolls sideways."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    thead = f"<thead><tr>{top}</tr></thead>" if head else ""
    kind = ' class="figures"' if head else ""
    return f'<div class="wide"><table{kind}>{thead}<tbody>{lines}</tbody></table></div>'


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) and math.isfinite(value) else "\u2013"


def _count(value: Any) -> str:
    return f"{int(value):,}" if isinstance(value, int | float) and math.isfinite(value) else "\u2013"


def _duration(hours: float) -> str:
    if not math.isfinite(hours):
        return "\u2013"
    seconds = round(hours * 3600)
    return f"{seconds} s" if seconds < 120 else f"{seconds // 60} min" if seconds < 7200 else f"{hours:.1f} h"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _html(title: str, body: Sequence[str]) -> str:
    text = "\n".join(part for part in body if part)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>{STYLE}{charts.STYLE}</style></head>
<body>
{text}
</body></html>
"""


STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --faint: #ddd; --note: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #16181b; --faint: #3a3d42; --note: #4a3b10; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 64rem;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: 0.9rem; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: 0.2rem 0.8rem 0.2rem 0; border-bottom: 1px solid var(--faint);
  vertical-align: top; font-variant-numeric: tabular-nums; }
th[scope=row] { font-weight: 500; } td { overflow-wrap: anywhere; } .figures td { white-space: nowrap; }
img { max-width: 100%; height: auto; background: #fff; } pre { overflow-x: auto; font-size: 0.8rem; }
.warnings { background: var(--note); padding: 0.1rem 1rem; border-radius: 0.5rem; } .warnings h2 { margin-top: 0.5rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0.5rem; }
.always { max-width: 31.5rem; }
figure { margin: 0; break-inside: avoid; } .key { margin-right: 1rem; white-space: nowrap; }
.axes input { margin: 0 0.2rem 0 0.8rem; } .axes .charts { display: none; margin-top: 0.5rem; }
#by-samples:checked ~ .samples, #by-evaluations:checked ~ .evaluations, #by-hours:checked ~ .hours { display: grid; }
summary { cursor: pointer; margin-top: 1.5rem; font-weight: 600; }
@media print { :root { --ink: #000; --paper: #fff; --faint: #ccc; } body { max-width: none; }
  .axes > input, .axes > label, .axes > span { display: none; } }
"""


@dataclass(frozen=True)
class ReportConfig:
    """Make the page of a run again, or one that compares several runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path | None = None
    """The file to write; report.html in the run folder, or comparison.html here for several runs."""


def main(args: list[str] | None = None) -> int:
    """The program; returns its exit code."""
    config = tyro.cli(ReportConfig, args=args, prog=PROGRAM)
    try:
        print(f"written: {_make(config)}")
    except FlowRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _make(config: ReportConfig) -> Path:
    if not config.runs:
        raise ConfigError(f"Name a run folder or several: {PROGRAM} runs/NAME runs/OTHER")
    runs = [RunFiles.read(folder) for folder in config.runs]
    single = len(runs) == 1
    out = config.out or (config.runs[0] / "report.html" if single else Path("comparison.html"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(_made(page, runs[0]) if single else _made(comparison_page, runs), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot write '{out}': {error}. Choose another place with --out.") from error
    return out


if __name__ == "__main__":
    sys.exit(main())
