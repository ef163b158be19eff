"""Train the velocity network that ships as the flow "gaussians": eight Gaussians in the plane.

    python pretrain/gaussians.py            # about five minutes on one core

Plain conditional flow matching on fresh samples; prints the exact W2 of the result to the mixture.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from fit_flow import as_shipped, save, train

from flowrl.envs.gaussians import eight_gaussians
from flowrl.functional.flow import interpolate
from flowrl.functional.metrics import wasserstein2
from flowrl.functional.solvers import ode_sample, time_grid

ASSET = Path(__file__).resolve().parent.parent / "flowrl" / "assets" / "gaussians"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ASSET)
    args = parser.parse_args()
    mixture, n = eight_gaussians(), 2048
    network = as_shipped(train(mixture.sample, 2, args.steps, args.batch, args.width, args.depth, args.seed))
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        x_0 = torch.randn(n, 2, generator=generator)
        x_1 = ode_sample(lambda x, t: network(x, t), x_0, time_grid(50), "heun")
    exact = [mixture.sample(n, generator) for _ in range(3)]
    w2, floor = wasserstein2(x_1, exact[0]), wasserstein2(exact[1], exact[2])
    x_0 = torch.randn(20_000, 2, generator=generator)
    t = torch.rand(20_000, generator=generator)
    x_t, _ = interpolate(x_0, mixture.sample(20_000, generator), t)
    with torch.inference_mode():
        error = (network(x_t, t) - mixture.velocity(t, x_t)).square().sum(1).mean().item()
    print(f"W2 {w2:.3f} (exact samples against each other: {floor:.3f}); field error {math.sqrt(error):.4f} rms")
    config = {
        "model": "mlp",
        "dim": 2,
        "width": args.width,
        "depth": args.depth,
        "description": "MLP trained on eight Gaussians",
        "trained": {"steps": args.steps, "batch": args.batch, "seed": args.seed},
        "w2": round(w2, 4),
        "w2_floor": round(floor, 4),
        "field_error_rms": round(math.sqrt(error), 4),
    }
    save(network, args.out, config)


if __name__ == "__main__":
    main()
