"""Figures of `latent-digits` with the environment's settings, by algorithm and seed: docs/how-to/latent.md.

python benchmarks/latent_digits.py                              # orw_w2, seeds 0 to 2
python benchmarks/latent_digits.py --algos tilt --seeds 0 --out runs/latent-tilt
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import flowrl
from flowrl.registry import environment_spec
from flowrl.runs.pictures import image_grid, stacked

OUT = Path(__file__).resolve().parent.parent / "docs" / "results" / "latent"
ENV, LEAST = "latent-digits", 0.02


def row(algo: str, seed: int, samples: int, n: int) -> tuple[dict[str, Any], Any]:
    model = flowrl.algorithm_class(algo)("FlowPolicy", ENV, seed=seed, device="cpu")  # type: ignore[operator]
    started = time.process_time()
    model.learn(samples)
    spent = time.process_time() - started
    result = flowrl.evaluate(model, n_samples=n)
    before, shares = result.reference, [result.components[f"digit {k}"] for k in range(10)]
    figures = {
        "algo": algo,
        "seed": seed,
        "samples": samples,
        "cpu_seconds": round(spent),
        "reward": [before.reward_mean, result.reward_mean],
        "judged": [before.components["judged even"], result.components["judged even"]],
        "even digits with >= 2 %": sum(share >= LEAST for share in shares[::2]),
        "least even digit": min(shares[::2]),
        "odd digits": sum(shares[1::2]),
        "diversity": [before.diversity, result.diversity],
        "w2": [before.w2_to_optimum, result.w2_to_optimum, result.w2_floor],
        "drift": result.drift,
    }
    return {key: rounded(value) for key, value in figures.items()}, result


def rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [round(v, 3) for v in value]
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", nargs="+", default=["orw_w2"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=environment_spec(ENV).total_timesteps)
    parser.add_argument("--eval-samples", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for algo in args.algos:
        for seed in args.seeds:
            figures, result = row(algo, seed, args.samples, args.eval_samples)
            rows.append(figures)
            print(json.dumps(figures), flush=True)
            (args.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
            if len(rows) == 1:
                halves = [torch.nn.functional.interpolate(x[:40].cpu(), scale_factor=3) for x in both(result)]
                stacked([image_grid(half, 20) for half in halves], 8).save(args.out / "samples.png")


def both(result: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return result.reference_samples, result.samples


if __name__ == "__main__":
    main()
