"""Plans found by reward fine-tuning, against random search with as many rollouts.

    python benchmarks/plans.py --out docs/results/plans

For each task, method and seed: the best return among all rollouts of the training, and what the trained flow then
draws. Random search takes as many plans from the reference flow, or from the random smooth plans that it was trained
on. Writes results.json, table.md and TASK.png (plans before and after); what results.json has is not made again.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kept import kept_results

import flowrl
from flowrl.envs.plans import TASKS, smooth_plans
from flowrl.functional.metrics import diversity
from flowrl.pages.benchmark_plots import save_drawing
from flowrl.pages.benchmark_results import summary
from flowrl.runs.callbacks import IterationCallback
from flowrl.runs.folder import finite_or_none
from flowrl.storage.files import write_json

TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "ORW-CFM-W2": ("orw_w2", {}),
    "ORW-CFM-W2, alpha 0.5": ("orw_w2", {"alpha": 0.5}),
    "ORW-CFM-W2, plain, alpha 0.5": ("orw_w2", {"alpha": 0.5, "target": "plain"}),
    "ORW-CFM": ("orw", {}),
    "RAFT": ("raft", {}),
    "DDPO": ("ddpo", {}),
    "Flow-GRPO": ("flow_grpo", {}),
}
RANDOM = ("random, reference flow", "random, smooth plans")
DEFAULT = (*RANDOM, "ORW-CFM-W2", "ORW-CFM-W2, alpha 0.5", "ORW-CFM-W2, plain, alpha 0.5")
COLUMNS = {
    "best": ("best return", 1),
    "mean": ("mean return", 1),
    "solved": ("solved", 2),
    "right": ("first right", 2),
    "solved_right": ("first right, of those that solve", 2),
    "better": ("better than random's best", 2),
    "better_right": ("of these first right", 2),
    "diversity": ("diversity", 2),
    "drift": ("drift", 2),
    "seconds": ("seconds of CPU", 0),
}
CHUNK, FINAL = 4096, 1024
Result = dict[str, Any]


class BestReturn(IterationCallback):
    """The best return of all rollouts of a training."""

    def __init__(self) -> None:
        super().__init__()
        self.best = -math.inf

    def on_iteration_end(self) -> bool:
        self.best = max(self.best, self.model.last_logged["rollout/reward_max"])
        return True


def described(plans: torch.Tensor, env: Any, threshold: float = math.inf) -> Result:
    """What plans are like; of those that solve the task, or whose return is over the threshold, also which side they
    take first."""
    parts = env.evaluate(plans, torch.zeros(len(plans), dtype=torch.long)).components
    good, solving = parts["return"] > threshold, parts["solved"] > 0
    return {
        "mean": parts["return"].mean().item(),
        "solved": parts["solved"].mean().item(),
        "right": parts["first_right"].mean().item(),
        "solved_right": parts["first_right"][solving].mean().item(),
        "better": good.float().mean().item(),
        "better_right": parts["first_right"][good].mean().item(),
        "diversity": diversity(plans, torch.zeros(len(plans), dtype=torch.long)).item(),
    }


def train(kind: str, method: str, seed: int, timesteps: int, threshold: float) -> tuple[Result, flowrl.FlowAlgorithm]:
    """One training with the environment's recommended settings, but for those that the method's name says."""
    started, best = time.process_time(), BestReturn()
    algo, settings = TRAINED[method]
    model = flowrl.algorithm_class(algo)("FlowPolicy", f"plan-{kind}", seed=seed, device="cpu", **settings)
    model.learn(timesteps, callback=best)
    seconds = time.process_time() - started
    result = flowrl.evaluate(model, n_samples=FINAL, seed=1000 + seed)
    figures = {"best": best.best * model.env.core.scale, "seconds": seconds, "rollouts": model.num_timesteps}
    return figures | {"drift": result.drift} | described(result.samples, model.env.core, threshold), model


def search(kind: str, method: str, seed: int, timesteps: int) -> Result:
    """The best of as many random plans."""
    started = time.process_time()
    model = flowrl.ORWCFMW2("FlowPolicy", f"plan-{kind}", seed=seed, device="cpu")
    generator = torch.Generator().manual_seed(1000 + seed)
    env, plans, best = model.env.core, torch.empty(0), -math.inf
    for n in torch.arange(timesteps).split(CHUNK):
        contexts = torch.zeros(len(n), dtype=torch.long)
        if method == "random, smooth plans":
            plans = smooth_plans(len(n), generator)
        else:
            with torch.inference_mode():
                plans = model.policy.sample_latents(contexts, role="reference", generator=generator)
        best = max(best, env.evaluate(plans, contexts).components["return"].max().item())
    figures = {"best": best, "rollouts": timesteps, "seconds": time.process_time() - started}
    return figures | described(plans[:FINAL], env)


def picture(kind: str, model: flowrl.FlowAlgorithm, path: Path) -> None:
    """Where 100 plans lead before and after training, at the same noise."""
    from matplotlib.figure import Figure

    result = flowrl.evaluate(model, n_samples=100, seed=5)
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    shown = [("reference", result.reference_samples), ("ORW-CFM-W2", result.samples)]
    last = None
    for i, (title, plans) in enumerate(shown):
        last = figure.add_subplot(1, 2, i + 1, sharey=last)
        model.env.core.plot(last, plans)
        last.set_title(f"{title}, plan-{kind}", fontsize=9)
    save_drawing(figure, path, dpi=80)


def table(results: Sequence[Result], kind: str) -> str:
    """Methods of a task as Markdown: means over seeds, and half of the 95 % interval."""
    mine = [result for result in results if result["task"] == kind]
    n = sorted({result["rollouts"] for result in mine})
    titles = ["method", *(title for title, _ in COLUMNS.values())]
    lines = [f"`plan-{kind}`, {' to '.join(f'{x:,}' for x in n)} rollouts, seeds {sorted({r['seed'] for r in mine})}"]
    lines += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for method in dict.fromkeys(result["method"] for result in mine):
        entries = [result for result in mine if result["method"] == method]
        values = {key: summary([e.get(key) for e in entries]) for key in COLUMNS}
        shown = [number(values[key], digits, len(entries)) for key, (_, digits) in COLUMNS.items()]
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def number(values: dict[str, float], digits: int, seeds: int) -> str:
    """Mean ± half width, and of how many seeds where others have no finite number; empty where none has."""
    if not values["n"]:
        return ""
    spread = f" ± {values['half_width']:.{digits}f}" if values["n"] > 1 else ""
    return f"{values['mean']:.{digits}f}{spread}" + (f" ({values['n']} of {seeds})" if values["n"] < seeds else "")


def main() -> None:
    """Make what is missing, write table and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=sorted(TASKS))
    parser.add_argument("--methods", nargs="+", choices=(*RANDOM, *TRAINED), default=DEFAULT)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--timesteps", type=int, help="rollouts; what the environment recommends unless given")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path, results = args.out / "results.json", kept_results(parser, args)
    done = {(result["task"], result["method"], result["seed"]) for result in results}
    wanted = [(kind, method, seed) for seed in args.seeds for kind in args.tasks for method in args.methods]
    for kind, method, seed in wanted:
        if (kind, method, seed) in done:
            continue
        timesteps = args.timesteps or flowrl.registry.environment_spec(f"plan-{kind}").total_timesteps
        found = [r["best"] for r in results if (r["task"], r["seed"]) == (kind, seed) and r["method"] in RANDOM]
        if method in RANDOM:
            result = search(kind, method, seed, timesteps)
        else:
            result, model = train(kind, method, seed, timesteps, max(found, default=math.inf))
            if method == "ORW-CFM-W2" and seed == args.seeds[0]:
                picture(kind, model, args.out / f"{kind}.png")
        results.append(finite_or_none({"task": kind, "method": method, "seed": seed, **result}))
        print(f"plan-{kind}, {method}, seed {seed}: best {result['best']:.1f}, mean {result['mean']:.1f}", flush=True)
        write_json(path, results)
        (args.out / "table.md").write_text("\n".join(table(results, k) for k in sorted({r["task"] for r in results})))


if __name__ == "__main__":
    main()
