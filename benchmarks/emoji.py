"""Compression of emoji by ORW-CFM-W2: alpha against reward, drift and distance.

python benchmarks/emoji.py

Writes results.json, table.md and samples.png into docs/results/emoji. Runs that results.json holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from kept import kept_results
from PIL import Image
from torch import nn

import flowrl
from flowrl.envs.emoji import real_emoji
from flowrl.functional.metrics import wasserstein2
from flowrl.runs.pictures import image_grid, stacked

OUT = Path(__file__).resolve().parent.parent / "docs" / "results" / "emoji"
ALPHAS, SEEDS = (0.0, 0.1, 0.2, 0.5, 1.0), (0, 1, 2)
N_SAMPLES = 256
COLUMNS = {
    "reward": "reward (minus kB)",
    "drift": "drift",
    "w2": "W2 of features",
    "frechet": "Fréchet distance to real ones",
    "diversity": "diversity",
}
DECIMALS = {"reward": 3, "drift": 4, "w2": 2, "frechet": 1, "diversity": 2}


class Features(nn.Module):
    """64 features of pictures: random convolutions, fixed by seed 0, and their means over the picture.

    Three layers of stride 2 with 32, 64 and 64 channels, SiLU between; divided by their standard deviation over the
    real pictures.
    """

    def __init__(self, real: torch.Tensor) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                *(nn.Conv2d(3, 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU()),
                nn.Conv2d(64, 64, 3, 2, 1),
            )
        self.mean, self.scale = torch.zeros(64), torch.ones(64)
        values = self(real)
        self.mean, self.scale = values.mean(0), values.std(0)

    @torch.inference_mode()
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features (B, 64)."""
        values = torch.cat([self.layers(2 * part - 1).mean((2, 3)) for part in pictures.split(256)])
        return (values - self.mean) / self.scale


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Fréchet distance of the Gaussians with the means and covariances of (N, D) and (M, D)."""
    a, b = a.double(), b.double()
    one, two = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(one @ two).real.clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + one.trace() + two.trace() - 2 * root).item()


def run(alpha: float, seed: int, samples: int, features: Features, real: torch.Tensor) -> tuple[dict[str, Any], Any]:
    """Fine-tune and evaluate once."""
    started = time.process_time()
    model = flowrl.ORWCFMW2("FlowPolicy", "emoji-compress", alpha=alpha, seed=seed, device="cpu")
    model.learn(samples)
    trained = time.process_time() - started
    result = flowrl.evaluate(model, n_samples=N_SAMPLES, seed=100, n_kept=N_SAMPLES)
    mine, before = features(result.samples), features(result.reference_samples)
    row = {"alpha": alpha, "seed": seed, "samples": model.num_timesteps, "cpu_seconds": round(trained, 1)}
    row |= {
        "reward": result.reward_mean,
        "drift": result.drift,
        "w2": wasserstein2(mine, before),
        "frechet": frechet(mine, features(real)),
        "diversity": result.diversity,
    }
    row["reference"] = {
        "reward": result.reference.reward_mean,
        "drift": 0.0,
        "w2": 0.0,
        "frechet": frechet(before, features(real)),
        "diversity": result.reference.diversity,
    }
    return row, result


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, a line for each alpha."""
    lines = [f"| alpha | seeds | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 2) + "|"]
    groups = {"reference": [rows[0]["reference"]]} if rows else {}
    for alpha in sorted({row["alpha"] for row in rows}):
        groups[f"{alpha:g}"] = [row for row in rows if row["alpha"] == alpha]
    for name, group in groups.items():
        cells = []
        for key, digits in DECIMALS.items():
            values = [row[key] for row in group]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {name} | {'' if name == 'reference' else len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(result: Any, path: Path, first: bool) -> None:
    """Add a row of 16 samples to the picture; the first one goes below a row of the reference's."""
    above = image_grid(result.reference_samples[:16], columns=16) if first else Image.open(path).convert("RGB")
    stacked([above, image_grid(result.samples[:16], columns=16)]).quantize(64).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument(
        "--samples", type=int, default=flowrl.registry.environment_spec("emoji-compress").total_timesteps
    )
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    file, rows = args.out / "results.json", kept_results(parser, args)
    real = real_emoji().pictures
    features = Features(real)
    for seed in args.seeds:
        for alpha in args.alphas:
            if any(row["alpha"] == alpha and row["seed"] == seed for row in rows):
                continue
            row, result = run(alpha, seed, args.samples, features, real)
            if seed == args.seeds[0]:
                picture(result, args.out / "samples.png", first=alpha == args.alphas[0])
            rows.append(row)
            file.write_text(json.dumps(rows, indent=1) + "\n")
            (args.out / "table.md").write_text(table(rows) + "\n")
            print(f"alpha {alpha:g} seed {seed}: " + ", ".join(f"{key} {row[key]:.4g}" for key in COLUMNS), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
