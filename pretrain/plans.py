"""Train the velocity network that ships as the flow "plans": random smooth sequences of actions.

    python pretrain/plans.py            # about ten minutes on one core

Prints how smooth samples are, and their mean return in both tasks, beside those of the plans it was trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from fit_flow import as_shipped, save, train

from flowrl.envs.plans import LENGTH, TASKS, PlanEnv, smooth_plans
from flowrl.functional.metrics import wasserstein2
from flowrl.functional.solvers import ode_sample, time_grid

ASSET = Path(__file__).resolve().parent.parent / "flowrl" / "assets" / "plans"


def describe(plans: torch.Tensor) -> dict[str, float]:
    """Roughness (mean |difference of neighbours|), share beyond the bounds, and figures of each task."""
    figures = {
        "roughness": plans.diff(dim=1).abs().mean().item(),
        "beyond": (plans.abs() > 1).float().mean().item(),
    }
    for kind, (task, solved, _) in TASKS.items():
        env = PlanEnv(task(), lambda: torch.nn.Identity(), solved, kind)
        components = env.reward(plans, [None] * len(plans)).components
        figures |= {f"{kind}_{key}": components[key].mean().item() for key in ("return", "solved", "first_right")}
    return {key: round(value, 4) for key, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ASSET)
    args = parser.parse_args()
    network = as_shipped(train(smooth_plans, LENGTH, args.steps, args.batch, args.width, args.depth, args.seed))

    n, generator = 2048, torch.Generator().manual_seed(1)
    with torch.inference_mode():
        x_0 = torch.randn(n, LENGTH, generator=generator)
        x_1 = ode_sample(lambda x, t: network(x, t), x_0, time_grid(50), "heun")
    exact = [smooth_plans(n, generator) for _ in range(3)]
    w2, floor = wasserstein2(x_1, exact[0]), wasserstein2(exact[1], exact[2])
    mine, data = describe(x_1), describe(exact[0])
    print(f"W2 {w2:.3f} (random plans against each other: {floor:.3f})")
    for key, value in mine.items():
        print(f"{key}: {value} (random plans: {data[key]})")
    config = {
        "model": "mlp",
        "dim": LENGTH,
        "width": args.width,
        "depth": args.depth,
        "description": "MLP trained on random smooth plans",
        "trained": {"steps": args.steps, "batch": args.batch, "seed": args.seed},
        "w2": round(w2, 4),
        "w2_floor": round(floor, 4),
        "samples": mine,
        "data": data,
    }
    save(network, args.out, config)


if __name__ == "__main__":
    main()
