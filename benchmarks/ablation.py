"""Strength of the penalty (alpha) against inverse temperature (tau) of ORW-CFM-W2, on one environment.

    python benchmarks/ablation.py --env gaussians-linear --out docs/results/ablation

Trains every pair of a grid with every seed at equal cost, and writes ENV.csv and ENV.png: reward, diversity, effective
share of the samples and, where the exact optimum is known, W2 to it. tau is in units of the rewards' standard
deviation, so that one grid fits every reward. Cells are those of `flowrl.benchmark`, kept in --work: the same command
goes on where it stopped, and a longer list of seeds only adds to them.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowrl.benchmark import run_cells
from flowrl.pages.benchmark_plots import save_drawing
from flowrl.suites.suite import Cell, load_suite

ALPHAS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
TAUS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
BUDGET = 500_000
PANELS = {
    "gain": "reward, gain / std of reference",
    "diversity": "diversity, share of reference",
    "ess": "effective share, mean of training",
    "w2": "W2 to the optimum, share of reference",
}
Row = dict[str, float]


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """All cells of the grid, seed by seed, checked as those of a suite are."""
    settings = {"standardise": "batch", **dict(map(setting, args.set))}
    shown = ", ".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    rows = [
        f'[rows."tau {tau:g}"]\nalgo = "{args.algo}"\nsettings = {{ tau = {tau!r}, {shown} }}\n'
        f"sweep = {{ alpha = {list(args.alphas)} }}\n"
        for tau in args.taus
    ]
    head = f"seeds = {args.seeds}\nbudget = {args.budget}\neval_samples = {args.eval_samples}\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ablation.toml"
        path.write_text(f"{head}[envs.{json.dumps(args.env)}]\n" + "".join(rows))
        cells = load_suite(str(path))
    return sorted(cells, key=lambda cell: cell.seed)


def setting(text: str) -> tuple[str, Any]:
    """`learning_rate=1e-3` as a name and a value."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def measured(folder: Path) -> Row | None:
    """Figures of a cell; None where it failed."""
    if not (folder / "result.json").exists():
        return None
    result, curve = (json.loads((folder / name).read_text()) for name in ("result.json", "curve.json"))
    before, ess = result["reference"], [row["rollout/ess"] for row in curve]
    optimum, start = result["w2_to_optimum"], before["w2_to_optimum"]
    return {
        "reward": result["reward_mean"],
        "gain": (result["reward_mean"] - before["reward_mean"]) / before["reward_std"],
        "diversity": known(result["diversity"]) / before["diversity"],
        "ess_first": ess[0],
        "ess": sum(ess) / len(ess),
        "w2": math.nan if start is None else known(optimum) / start,
        "drift": known(result["drift"]),
        "velocity": known(result["velocity_ratio"]),
        "samples": result["cost"]["samples"],
    }


def known(value: float | None) -> float:
    """A figure of a file, where null stands for one that is not finite."""
    return math.nan if value is None else value


def table(cells: Sequence[Cell], root: Path) -> list[Row]:
    """A row for each pair: means over the seeds that are done, and the standard deviation of gain, diversity and W2."""
    groups: dict[tuple[float, float], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.settings["alpha"], cell.settings["tau"]), []).append(cell)
    rows = []
    for (alpha, tau), members in groups.items():
        done = [figures for cell in members if (figures := measured(root / cell.folder))]
        failed = sum((root / cell.folder / "error.txt").exists() for cell in members)
        row = {"alpha": alpha, "tau": tau, "seeds": len(done), "failed": failed}
        for key in done[0] if done else ():
            row[key] = float(np.mean([figures[key] for figures in done]))
            if key in PANELS and len(done) > 1:
                row[f"{key}_std"] = float(np.std([figures[key] for figures in done], ddof=1))
        rows.append(row)
    return rows


def works(row: Row) -> bool:
    """Whether half a standard deviation of reward is won, half of the diversity kept, and no run failed or ran off.

    A flow that runs off its data has velocities that are much longer than the reference's.
    """
    if row["failed"] or not row["seeds"]:
        return False
    return row["gain"] >= 0.5 and row["diversity"] >= 0.5 and row["velocity"] <= 1.5


def heat_maps(rows: Sequence[Row], title: str) -> Any:
    """One panel for each measure that there is; what works is framed, a pair of which seeds failed says how many."""
    from matplotlib.figure import Figure

    alphas, taus = (sorted({row[key] for row in rows}) for key in ("alpha", "tau"))
    panels = {key: label for key, label in PANELS.items() if any(math.isfinite(r.get(key, math.nan)) for r in rows)}
    figure = Figure(figsize=(4.1 * len(panels), 3.7), layout="constrained")
    for i, (key, label) in enumerate(panels.items()):
        values = np.full((len(taus), len(alphas)), np.nan)
        for row in rows:
            values[taus.index(row["tau"]), alphas.index(row["alpha"])] = row.get(key, math.nan)
        axes = figure.add_subplot(1, len(panels), i + 1)
        ends = (np.nanmin(values), min(np.nanmax(values), 3.0))
        axes.imshow(values, origin="lower", aspect="auto", cmap="cividis", vmin=ends[0], vmax=ends[1])
        for row in rows:
            x, y = alphas.index(row["alpha"]), taus.index(row["tau"])
            value = row.get(key, math.nan)
            text = f"{value:.{2 if abs(value) < 10 else 0}f}" if not row["failed"] else f"{row['failed']:g} failed"
            dark = not value > sum(ends) / 2
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
            if works(row):
                axes.plot(*zip(*[(x + a, y + b) for a, b in FRAME]), color="#D55E00", linewidth=1.2)
        axes.set(title=label, xlabel="alpha", ylabel="" if i else f"{title}\ntau")
        axes.title.set_fontsize(9)
        axes.set_xticks(range(len(alphas)), [f"{a:g}" for a in alphas], fontsize=8)
        axes.set_yticks(range(len(taus)), [f"{t:g}" for t in taus], fontsize=8)
    return figure


FRAME = ((-0.46, -0.46), (0.46, -0.46), (0.46, 0.46), (-0.46, 0.46), (-0.46, -0.46))


def write(rows: Sequence[Row], env: str, out: Path) -> None:
    """ENV.csv and ENV.png."""
    out.mkdir(parents=True, exist_ok=True)
    name = env.replace(":", ".")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*keys, "works"])
        writer.writerows([*(f"{row.get(key, math.nan):.4g}" for key in keys), int(works(row))] for row in rows)
    save_drawing(heat_maps(rows, env), out / f"{name}.png", dpi=80)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not done yet, write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", required=True)
    parser.add_argument("--algo", default="orw_w2", help="or another that has alpha and tau, as orw_kl")
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS)
    parser.add_argument("--taus", type=float, nargs="+", default=TAUS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--budget", type=int, default=BUDGET, help="network evaluations of a cell")
    parser.add_argument("--eval-samples", type=int, default=512)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further settings of the algorithm")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="folder of the cells")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draw-only", action="store_true", help="of the cells that are done")
    args = parser.parse_args(arguments)
    cells = cells_of(args)
    if not args.draw_only:
        run_cells(cells, args.work, args.workers)
    write(table(cells, args.work), args.env, args.out)


if __name__ == "__main__":
    main()
