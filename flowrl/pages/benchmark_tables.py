"""The tables of a benchmark, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flowrl.pages.benchmark_results import Entry
from flowrl.pages.text import markdown_table


def markdown(entries: Sequence[Entry]) -> str:
    """Write one table per environment."""
    parts = []
    for env in dict.fromkeys(entry["env"] for entry in entries):
        here = [entry for entry in entries if entry["env"] == env]
        done = [entry for entry in here if entry["seeds_finished"]]
        parts.append(f"### {env}\n\n{_table(here, done[0]) if done else 'No cell has finished.'}\n")
    return "\n".join(parts)


def _table(entries: Sequence[Entry], example: Entry) -> str:
    """Write the table of an environment; `example` is a finished entry, which has all of its columns."""
    exact = not math.isnan(example["w2_to_optimum"]["mean"])
    reference = example["reference_reward_mean"]["mean"], example["reference_diversity"]["mean"]
    head = ["algorithm", "reward", "gain", "IQM", "diversity", "drift", *(["W2 to optimum"] if exact else [])]
    head += ["aims at lambda"]
    head += ["gain, held-out prompts", "diversity of these"] if "held_out" in example else []
    head += [f"change in {name}, held out" for name in example.get("eval_rewards", {})]
    head += [*example["components"], "network evaluations", "to 90 %", "then per sample"]
    head += ["samples", "updates", "minutes", "seeds"]
    before = f"Before training: reward {reference[0]:.3g}, diversity {reference[1]:.3g}."
    if exact:
        before += f" W2 of exact samples against each other: {example['w2_floor']['mean']:.3g}."
    return f"{before}\n\n{markdown_table(head, [_row(entry, exact, example) for entry in entries])}"


def _row(entry: Entry, exact: bool, example: Entry) -> list[str]:
    if not entry["seeds_finished"]:
        return [entry["label"], f"failed ({entry['seeds_failed']} seeds)"]
    cost, seeds = entry["cost"], entry["seeds_finished"]
    cells = [entry["label"], interval(entry["reward_mean"], seeds), interval(entry["gain"], seeds)]
    cells.append(f"{entry['reward_mean']['iqm']:.3g}")
    cells += [interval(entry["diversity"], seeds), drift(entry)]
    cells += [interval(entry["w2_to_optimum"], seeds)] if exact else []
    cells.append(target(entry))
    if "held_out" in example:
        cells += [interval(entry["held_out"][key]) if "held_out" in entry else "" for key in ("gain", "diversity")]
    changes, parts = entry.get("eval_rewards", {}), entry["components"]
    cells += [interval(changes[name], seeds) if name in changes else "" for name in example.get("eval_rewards", {})]
    cells += [f"{parts[key]['mean']:.3g}" if key in parts else "" for key in example["components"]]
    to_90 = entry.get("evaluations_to_90_percent")
    cells.append(f"{cost['network_evaluations']:.2g}")
    cells.append("" if to_90 is None else f"{to_90:.2g}")
    cells.append(f"{entry['evaluations_per_sample']:.0f}")
    cells += [f"{cost['samples']:.0f}", f"{cost['gradient_steps']:.0f}", f"{cost['training_seconds'] / 60:.1f}"]
    return [*cells, str(seeds)]


def drift(entry: Entry) -> str:
    """Write the mean over seeds, and in how many of them it is finite where a trained flow ran off in some."""
    seeds = entry["seeds_finished"] if entry["cost"]["gradient_steps"] else 0  # steering has no drift
    return _told(figure(entry["drift"]["mean"], 2), entry["drift"]["n"], seeds)


def target(entry: Entry) -> str:
    """Write lambda of the tilt that a method aims at in the end, or that it states none; nothing of steering."""
    if not entry["cost"]["gradient_steps"]:
        return ""
    return figure(entry["target_lambda"], 2) or "states no target"


def figure(value: float, digits: int) -> str:
    """Write a number; nothing for one that is missing."""
    return "" if math.isnan(value) else f"{value:.{digits}g}"


def interval(values: dict[str, float], seeds: int = 0) -> str:
    """Write a mean and the half-width of its interval, and in how many of the `seeds` it is finite where not in all."""
    half = values["half_width"]
    text = figure(values["mean"], 3) + ("" if math.isnan(half) else f" ± {half:.2g}")
    return _told(text, int(values["n"]), seeds)


def _told(text: str, n: int, seeds: int) -> str:
    return f"{text} (finite in {n} of {seeds})".strip() if n < seeds else text
