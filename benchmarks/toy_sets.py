"""How near to the optimum samples come on the toys in the mean over many sets: the W2 of one set varies by a fifth.

    python benchmarks/toy_sets.py --algos tilt --out figures.json

Each algorithm is trained as the suite `toy` does it, with what the environments recommend. Then sets of samples are
drawn, each is compared with a set of exact samples of the optimum, and exact ones are compared with each other. So is
what as many steps of the solver make of the optimum's exact field, where that is a mixture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

import flowrl
from flowrl.envs.gaussians import GaussiansEnv, LinearReward, QuadraticReward
from flowrl.functional.metrics import wasserstein2
from flowrl.functional.solvers import SOLVERS, Solver, ode_sample, time_grid
from flowrl.suites.cell import UNBOUNDED, StopAtBudget

STEPS = 16
"""As the toys recommend."""
ENVS = ("gaussians-linear", "gaussians-quadratic", "gaussians-ring")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def interval(values: list[float]) -> dict[str, float]:
    """Mean and half its 95 % interval, for many values; and the spread of one."""
    return {"mean": fmean(values), "ci": 1.96 * stdev(values) / len(values) ** 0.5, "std": stdev(values)}


def trained(algo: str, env: str, seed: int, budget: int, solver: Solver) -> flowrl.FlowAlgorithm:
    model = flowrl.algorithm_class(algo)("FlowPolicy", env, seed=seed, device="cpu", solver=solver)
    model.learn(UNBOUNDED, callback=StopAtBudget(budget))
    return model


def measure(
    env: str, algos: list[str], seeds: list[int], sets: int, n: int, budget: int, solver: Solver = "euler"
) -> dict[str, Any]:
    """Measure W2 to the optimum: of exact samples, `4 * sets` times, of its field and of each trained flow, `sets`."""
    core = flowrl.make(env)
    assert isinstance(core, GaussiansEnv)
    assert core.oracle is not None
    exact = [core.oracle.sample(n, generator(50_000 + i)) for i in range(sets)]
    others = (core.oracle.sample(n, generator(60_000 + i)) for i in range(4 * sets))
    found: dict[str, Any] = {"exact": interval([wasserstein2(exact[i % sets], x) for i, x in enumerate(others)])}
    if isinstance(core.oracle.reward, LinearReward | QuadraticReward):
        field = core.oracle.reward.tilt(core.oracle.base, core.oracle.tau).velocity
        noise = (torch.randn(n, core.mixture.dim, generator=generator(70_000 + i)) for i in range(sets))
        drawn = (ode_sample(lambda x, t: field(t, x), x_0, time_grid(STEPS), solver) for x_0 in noise)
        found["exact field"] = interval([wasserstein2(x, exact[i]) for i, x in enumerate(drawn)])
    for algo in algos:
        by_seed = []
        for seed in seeds:
            policy = trained(algo, env, seed, budget, solver).policy
            drawn = (policy.sample(n=n, generator=generator(70_000 + 100 * seed + i)) for i in range(sets))
            by_seed.append(fmean(wasserstein2(x, exact[i]) for i, x in enumerate(drawn)))
        found[algo] = {"mean": fmean(by_seed), "by_seed": by_seed}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", nargs="+", default=["tilt"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--sets", type=int, default=32)
    parser.add_argument("--eval-samples", type=int, default=1024)
    parser.add_argument("--budget", type=int, default=1_000_000)
    parser.add_argument("--solver", choices=SOLVERS, default="euler", help="draws what is learnt from and compared")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    for env in ENVS:
        figures[env] = measure(env, args.algos, args.seeds, args.sets, args.eval_samples, args.budget, args.solver)
        for name, row in figures[env].items():
            spread = f" ± {row['ci']:.4f}, one set ± {row['std']:.3f}" if "ci" in row else ""
            by_seed = " ".join(f"{value:.3f}" for value in row.get("by_seed", ()))
            print(f"{env:20} {name:11} {row['mean']:.4f}{spread} {by_seed}".rstrip(), flush=True)
    for name in ("exact", *args.algos):
        print(f"{'mean':20} {name:11} {fmean(figures[env][name]['mean'] for env in ENVS):.4f}")
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
