"""The page of a run: `report.html` of a run folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl.envs.prompts import PICTURE
from flowrl.evaluation.results import asked, listed
from flowrl.pages.html import folded, heading, page, paragraph, preformatted, table, warning_list
from flowrl.pages.run_files import RunFiles, telling_damage
from flowrl.pages.text import change, count, duration, number, setting, span
from flowrl.pages.training_charts import STYLE, before_after, training_charts
from flowrl.runs.pictures import STEPS
from flowrl.storage.files import written_whole


def write_report(folder: Path, tag: str = "") -> Path:
    """Write `report{tag}.html` of a run.

    Args:
        folder: Run folder.
        tag: End of the names of `evaluation{tag}.json` and `before_after{tag}.png`: an evaluation beside the run's own.

    Raises:
        ConfigError: It is no run folder, or a file in it is damaged.
    """
    path = folder / f"report{tag}.html"
    text = run_page(RunFiles.read(folder, tag))
    with written_whole(path) as new:
        new.write_text(text, encoding="utf-8")
    return path


@telling_damage()
def run_page(run: RunFiles) -> str:
    """Write the page of a run: settings, result, curves, pictures, warnings.

    Raises:
        ConfigError: Its files are damaged.
    """
    evaluation = run.evaluation
    body = [
        heading(run.name, 1),
        table(_facts(run)),
        warning_list([*run.warnings, *evaluation.get("warnings", ())]),
        *([heading("Result"), _result(run)] if evaluation else []),
        *([heading("Before and after"), before_after(run)] if run.before_after else []),
        heading("Training"),
        training_charts([run]),
        _by_prompt(evaluation.get("per_prompt") or []),
        folded("config.json", preformatted(json.dumps(run.config, indent=1))),
    ]
    return page(run.name, body, STYLE)


def _facts(run: RunFiles) -> list[tuple[str, Any]]:
    config = run.config
    settings = ", ".join(f"{key} = {setting(value)}" for key, value in run.settings.items()) or "all as they are"
    return [
        ("algorithm", config.get("algorithm")),
        ("environment", run.environment.get("name", "an object")),
        ("flow", config.get("flow") or "from a factory"),
        ("settings that differ from the algorithm's defaults", settings),
        ("seed", config.get("seed")),
        ("device", config.get("device")),
        ("samples", count(run.last.get(STEPS))),
        ("network evaluations", count(run.last.get("time/network_evaluations"))),
        ("training time", duration(run.along("hours")[-1] if run.rows else math.nan)),
        ("flowrl", config.get("flowrl")),
    ]


def _result(run: RunFiles) -> str:
    """Write reference, trained flow and change of every figure of the evaluation."""
    after, before = run.evaluation, run.reference
    pairs = [("reward", before.get("reward_mean"), after.get("reward_mean"))]
    for part in ("components", "side"):
        old, new = before.get(part) or {}, after.get(part) or {}
        pairs += [(key, old.get(key), value) for key, value in new.items()]
        if part == "components":
            pairs.append(("diversity", before.get("diversity"), after.get("diversity")))
    if after.get("w2_to_optimum") is not None:
        pairs.append(("W2 to optimum", before.get("w2_to_optimum"), after["w2_to_optimum"]))
    rows = [(name, number(old), number(new), change(old, new)) for name, old, new in pairs]
    return table(rows, ["", "reference", "trained", "change"]) + "".join(map(paragraph, _notes(after)))


def _notes(evaluation: Mapping[str, Any]) -> list[str]:
    notes = [
        f"Reward of the trained flow, 95 % interval: {span(evaluation.get('reward_ci'))} "
        f"({count(evaluation.get('n_samples'))} samples).",
        f"Drift E|v - v_ref|\u00b2: {number(evaluation.get('drift'))}; "
        f"effective sample share: {number(evaluation.get('ess'))}.",
    ]
    if evaluation.get("trained_samples") is not None:
        notes.append(f"It had been trained on {count(evaluation['trained_samples'])} samples.")
    if evaluation.get("win_rates"):
        intervals = evaluation.get("win_rate_cis") or {}
        won = [f"{name} {number(rate)} ({span(intervals.get(name))})" for name, rate in evaluation["win_rates"].items()]
        notes.append(f"Win rate over the reference, ties counting half: {', '.join(won)}.")
    if evaluation.get("n_prompts"):
        n_drawn = len(evaluation.get("per_prompt") or [])
        notes.append(asked(str(evaluation.get("prompts")), evaluation["n_prompts"], n_drawn))
    if evaluation.get("sampling"):
        notes.append(f"Sampled with {listed(evaluation['sampling'])}, otherwise as in training.")
    if evaluation.get("w2_floor") is not None:
        notes.append(f"W2 of exact samples against each other: {number(evaluation['w2_floor'])}.")
    return notes


def _by_prompt(found: list[Mapping[str, Any]]) -> str:
    """Write the mean reward of each prompt, in a part that opens; the largest changes first."""
    if not found:
        return ""
    ordered = sorted(found, key=lambda row: row["reference"] - row["trained"])
    rows = [
        (
            f"{row['prompt']}{f' with {row[PICTURE]}' if PICTURE in row else ''}",
            row["n"],
            *(number(row[key]) for key in ("reference", "trained")),
            change(row["reference"], row["trained"]),
        )
        for row in ordered
    ]
    return folded(
        f"Reward by prompt ({len(rows)})", table(rows, ["prompt", "samples", "reference", "trained", "change"])
    )
