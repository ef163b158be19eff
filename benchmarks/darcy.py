"""Darcy's equation met by reward fine-tuning, by choice among samples, and by guidance, at equal cost.

    python benchmarks/darcy.py --out docs/results/darcy

Each method draws `--samples` pairs for as many network evaluations in all (a forward is 1 per sample, a backward 2): a
training and its samples, or samples that cost more each. Writes results.json, table.md and samples.png (pairs and their
residuals before and after training); what results.json has is not made again. Settings are the environment's, but for
those that `TRAINED` and `--set` say.
"""

from __future__ import annotations

import argparse
import ast
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kept import kept_results

import flowrl
from flowrl.envs.base import GenerationEnv, draw_contexts
from flowrl.envs.darcy import SHOWN_LOG_K, SHOWN_P
from flowrl.envs.darcy_data import KINDS, random_log_k
from flowrl.evaluation.steering import Steering, steer
from flowrl.functional.darcy import residual, solve
from flowrl.functional.flow import x1_hat
from flowrl.functional.metrics import diversity
from flowrl.pages.benchmark_plots import save_drawing
from flowrl.runs.folder import finite_or_none
from flowrl.storage.files import write_json
from flowrl.suites.cell import UNBOUNDED, StopAtBudget

TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "DRaFT": ("draft", {}),
    "ORW-CFM-W2": ("orw_w2", {}),
    "Flow-GRPO": ("flow_grpo", {}),
}
SHOWN = "DRaFT"
STEERED = ("best of n", "guidance")
REFERENCE, DATA = "reference", "data"
METHODS = (REFERENCE, DATA, *TRAINED, *STEERED)
STRENGTH = 0.3
"""Of guidance: length of its push in units of the velocity's own, root mean squares."""
GUIDED_COST = 3
"""Network evaluations of a guided step: a forward and the backward that goes through it."""
COLUMNS = {
    "residual": ("squared residual", 4, True),
    "pressure error": ("error of p", 4, True),
    "W2 of log K": ("W2 of log K", 2, True),
    "diversity": ("diversity", 2, True),
    "spectrum of log K": ("spectrum", 3, False),
    "values of log K": ("values", 3, False),
    "wall error": ("wall error", 4, False),
    "reward": ("reward", 2, False),
    "seconds": ("seconds of CPU", 0, False),
}
"""Figure -> title, digits, and whether its ratio to the reference is shown, too."""
Result = dict[str, Any]


def figures(env: GenerationEnv, samples: torch.Tensor, ids: torch.Tensor, seed: int) -> Result:
    """What `flowrl.evaluate` says of samples: the reward, its component, diversity, and the judges' errors."""
    contexts = [env.contexts[i] for i in ids.tolist()]
    output = env.evaluate(samples, ids).detached()
    errors = {name: value.mean().item() for name, value in env.errors(samples, contexts).items()}
    return {
        "reward": output.reward.mean().item(),
        "residual": output.components["residual"].mean().item(),
        "diversity": diversity(samples, ids).item(),
        **errors,
        **env.errors_of_all(samples, contexts, seed),
        "by_kind": {kind: output.components["residual"][ids == i].mean().item() for i, kind in enumerate(env.contexts)},
    }


def guided(
    policy: flowrl.FlowPolicy, env: GenerationEnv, ids: torch.Tensor, x_0: torch.Tensor, steps: int, strength: float
) -> torch.Tensor:
    """Latents of the reference whose velocity is pushed along the reward's gradient at the one-step estimate.

    The gradient goes through the network, as in diffusion posterior sampling (Chung et al. 2023, arXiv 2209.14687); it
    is scaled to `strength` times the length of the velocity, since that of a logarithm grows as residuals fall.
    """
    field, times, x = policy.field(policy.condition(ids), len(ids), "reference"), policy.times(steps), x_0
    for k in range(steps):
        x = x.detach().requires_grad_()
        t = times[k].expand(len(x))
        v = field(x, t)
        reward = env.evaluate(policy.decode(x1_hat(v, x, t)), ids).reward
        (push,) = torch.autograd.grad(reward.sum(), x)
        scale = strength * v.detach().flatten(1).norm(dim=1) / push.flatten(1).norm(dim=1).clamp_min(1e-12)
        x = x.detach() + (times[k + 1] - times[k]) * (v.detach() + scale[:, None, None, None] * push)
    return x


def run(method: str, seed: int, args: argparse.Namespace) -> tuple[Result, Any]:
    """Samples of a method and their figures; and its trained model, where there is one."""
    started = time.process_time()
    n, batch, model = args.samples, args.samples_at_once, None
    per_sample = args.budget // n
    generator = torch.Generator().manual_seed(10_000 + seed)
    if method in TRAINED:
        algo, settings = TRAINED[method]
        model = flowrl.algorithm_class(algo)("FlowPolicy", "darcy", seed=seed, device="cpu", **settings, **args.set)
        policy, env = model.policy, model.env.core
        model.learn(UNBOUNDED, callback=StopAtBudget(args.budget - n * policy.steps))
    else:
        env = flowrl.make("darcy")
        policy = flowrl.FlowPolicy.of(env, device="cpu", seed=seed)
    trained_for = policy.evaluations
    ids = draw_contexts(len(env.contexts), n, 8, generator)
    noise = policy.noise(n, generator)
    parts = []
    for c, x_0 in zip(ids.split(batch), noise.split(batch)):
        if method == DATA:
            continue
        if method == "guidance":
            drawn = guided(policy, env, c, x_0, per_sample // GUIDED_COST, args.strength)
        elif method == "best of n":
            best = Steering(n=per_sample // policy.steps)
            drawn = torch.cat([steer(policy, env, best, part, generator) for part in c.split(8)])
        else:
            drawn = policy.sample_latents(c, x_0=x_0, role=policy.sampling_role if model else "reference")
        parts.append(policy.decode(drawn).detach())
    if method == DATA:
        log_k = random_log_k(ids, env.sample_shape[-1], generator)
        parts = [torch.stack([log_k, solve(log_k)], dim=1)]
    found = {
        "method": method,
        "seed": seed,
        "samples": n,
        "trained_for": trained_for,
        "evaluations": policy.evaluations,
        "seconds": time.process_time() - started,
        "gradient_steps": 0 if model is None else model._n_updates,
        **figures(env, torch.cat(parts), ids, 20_000 + seed),
    }
    return found, model


def picture(model: flowrl.FlowAlgorithm, path: Path) -> None:
    """A pair of each kind with its residual, before and after training, at the same noise."""
    from matplotlib.figure import Figure

    policy, ids = model.policy, torch.arange(2)
    x_0 = policy.noise(2, torch.Generator().manual_seed(5))
    roles = (("before", "reference"), ("after", policy.sampling_role))
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    grid = figure.subplots(len(KINDS), 2 * 3)
    for half, (title, role) in enumerate(roles):
        pairs = policy.decode(policy.sample_latents(ids, x_0=x_0, role=role)).detach()
        for row, kind in enumerate(KINDS):
            log_k, p = pairs[row]
            r = residual(log_k, p)
            square, r = r.square().mean().item(), r.abs().clamp_min(1e-4).log10()
            shown = (
                (log_k, "viridis", -SHOWN_LOG_K, SHOWN_LOG_K, f"{title}: log K"),
                (p, "magma", 0, SHOWN_P, f"p ({kind})"),
                (r, "cividis", -2, 1, f"residual², mean {square:.3f}"),
            )
            for column, (values, colours, low, high, text) in enumerate(shown):
                axes = grid[row][3 * half + column]
                axes.imshow(values.numpy(), cmap=colours, vmin=low, vmax=high)
                axes.set_title(text, fontsize=8)
                axes.set_axis_off()
    save_drawing(figure, path, dpi=80)


def table(results: Sequence[Result]) -> str:
    """Methods as Markdown: means and standard deviations over seeds, and ratios to the reference of the same seed."""
    titles = ["method", "seeds", "network evaluations, of them training"]
    titles += [title for title, _, _ in COLUMNS.values()]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    before = {result["seed"]: result for result in results if result["method"] == REFERENCE}
    for method in dict.fromkeys(name for name in METHODS if any(r["method"] == name for r in results)):
        mine = [result for result in results if result["method"] == method]
        cost = f"{mine[0]['evaluations']:,}, {mine[0]['trained_for']:,}"
        shown = []
        for key, (_, digits, compared) in COLUMNS.items():
            text = spread([result[key] for result in mine], digits)
            if compared and method != REFERENCE and all(r["seed"] in before for r in mine):
                text += f" (x {spread([r[key] / before[r['seed']][key] for r in mine], 3)})"
            shown.append(text)
        lines.append(f"| {method} | {len(mine)} | {cost} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; the mean alone of a single value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def setting(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE; a value that is no literal is a text."""
    key, _, value = text.partition("=")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing, write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=20_480, help="network evaluations of a method, samples included")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--samples-at-once", type=int, default=64)
    parser.add_argument("--strength", type=float, default=STRENGTH, help="of guidance")
    parser.add_argument("--set", nargs="*", type=setting, default=[], help="settings of all that is trained, KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    path, results = args.out / "results.json", kept_results(parser, args)
    args.set = dict(args.set)
    torch.set_num_threads(1)
    done = {(result["method"], result["seed"]) for result in results}
    for seed in args.seeds:
        for method in args.methods:
            if (method, seed) in done:
                continue
            result, model = run(method, seed, args)
            if method == SHOWN and seed == args.seeds[0]:
                picture(model, args.out / "samples.png")
            results.append(finite_or_none(result))
            print(
                f"{method}, seed {seed}: residual {result['residual']:.4f}, error of p {result['pressure error']:.4f}, "
                f"{result['evaluations']:,} evaluations, {result['seconds']:.0f} s",
                flush=True,
            )
            write_json(path, results)
            (args.out / "table.md").write_text(table(results))


if __name__ == "__main__":
    main()
