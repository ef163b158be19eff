"""The target-generation experiment of ORW-CFM-W2 on `digits-even`: alpha against reward and diversity.

python benchmarks/digits.py

Writes results.json, table.md and samples.png into docs/results/digits. Runs that results.json holds are not run again;
with `--data-dir` and `--flow` the same on MNIST, with `--set` other settings of the algorithm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from ablation import setting
from kept import kept_results
from PIL import Image

import flowrl
from flowrl.envs.rewards.even import CLASSES
from flowrl.runs.pictures import image_grid, stacked

OUT = Path(__file__).resolve().parent.parent / "docs" / "results" / "digits"
ALPHAS, SEEDS = (0.0, 0.3, 0.8), (0, 1, 2)
N_SAMPLES, COVERED = 1024, 0.02
COLUMNS = {
    "reward": "reward",
    "judged even": "held-out reward",
    "entropy": "class entropy (nats)",
    "coverage": "classes with >= 2 %",
    "even_coverage": "even ones of them",
    "diversity": "diversity",
    "drift": "drift",
    "w2": "W2 to real even digits",
}


def figures(statistics_of: Any, drift: float) -> dict[str, Any]:
    """Row of the table from the statistics of samples."""
    shares = torch.tensor([statistics_of.components[f"digit {k}"] for k in range(CLASSES)])
    return {
        "reward": statistics_of.reward_mean,
        "judged even": statistics_of.components["judged even"],
        "entropy": -(shares * shares.clamp_min(1e-12).log()).sum().item(),
        "coverage": int((shares >= COVERED).sum()),
        "even_coverage": int((shares[::2] >= COVERED).sum()),
        "diversity": statistics_of.diversity,
        "drift": drift,
        "w2": statistics_of.w2_to_optimum,
        "shares": shares.tolist(),
    }


def run(
    alpha: float, seed: int, samples: int, env: dict[str, Any], settings: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
    """Fine-tune and evaluate once."""
    started = time.process_time()
    settings = {"alpha": alpha, "seed": seed, "device": "cpu", "env_settings": env, **settings}
    model = flowrl.ORWCFMW2("FlowPolicy", "digits-even", **settings)
    model.learn(samples)
    trained = time.process_time() - started
    result = flowrl.evaluate(model, n_samples=N_SAMPLES, seed=100)
    row = {"alpha": alpha, "seed": seed, "samples": model.num_timesteps, "cpu_seconds": round(trained, 1)}
    row |= figures(result, result.drift)
    row["reference"] = figures(result.reference, 0.0)
    row["w2_floor"] = result.w2_floor
    return row, result


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, a line for each alpha."""
    lines = [f"| alpha | seeds | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 2) + "|"]
    groups = {"reference": [rows[0]["reference"]]} if rows else {}
    for alpha in sorted({row["alpha"] for row in rows}):
        groups[f"{alpha:g}"] = [row for row in rows if row["alpha"] == alpha]
    for name, group in groups.items():
        cells = []
        for key in COLUMNS:
            values = [row[key] for row in group]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        n = "" if name == "reference" else len(group)
        lines.append(f"| {name} | {n} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(strips: list[torch.Tensor], path: Path, scale: int) -> None:
    """Rows of samples as a palette PNG: two rows of 24 for each of the strips, the reference first."""
    sheet = stacked([image_grid(s[:48], columns=24, pad=1) for s in strips], gap=3)
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
    sheet.convert("L").quantize(17).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--samples", type=int, default=flowrl.registry.environment_spec("digits-even").total_timesteps)
    parser.add_argument("--flow", default="digits")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further settings of the algorithm")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    file, rows = args.out / "results.json", kept_results(parser, args)
    strips: dict[float, torch.Tensor] = {}
    for seed in args.seeds:
        for alpha in args.alphas:
            if any(row["alpha"] == alpha and row["seed"] == seed for row in rows):
                continue
            env = {"flow": args.flow, "data_dir": args.data_dir}
            row, result = run(alpha, seed, args.samples, env, dict(map(setting, args.set)))
            rows.append(row)
            file.write_text(json.dumps(rows, indent=1) + "\n")
            (args.out / "table.md").write_text(table(rows) + "\n")
            print(f"alpha {alpha:g} seed {seed}: " + ", ".join(f"{key} {row[key]:.3f}" for key in COLUMNS), flush=True)
            strips[alpha] = result.samples
            if seed == args.seeds[0] and len(strips) == len(args.alphas):
                shown = [result.reference_samples, *(strips[a] for a in args.alphas)]
                picture(shown, args.out / "samples.png", scale=3 if shown[0].shape[-1] < 16 else 1)
    print(table(rows))


if __name__ == "__main__":
    main()
