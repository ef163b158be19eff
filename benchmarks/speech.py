"""Speech made to sound better to a learned listener: by training and by choice among samples, at equal cost.

    python benchmarks/speech.py --out docs/results/speech            # needs the extra [speech]

To say a sentence and to judge it is what costs here, so a method's cost is the number of samples that it has judged:
`--budget` for training, or for choosing among several for each of the `--samples` of the evaluation. Those are drawn
from the same noise by all methods of a seed, and judged by DNSMOS and a recogniser, too. Writes results.json, table.md,
and of the first seed pictures and sounds before and after; what results.json has is not made again. Settings are the
environment's, but for those that `TRAINED` and `--set` say.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from darcy import setting, spread
from kept import kept_results

import flowrl
from flowrl.functional.metrics import diversity, mean_interval
from flowrl.runs.callbacks import IterationCallback
from flowrl.runs.folder import finite_or_none
from flowrl.runs.media import save_sound
from flowrl.runs.pictures import image_grid, stacked
from flowrl.storage.files import write_json
from flowrl.suites.cell import UNBOUNDED

TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "ORW-CFM-W2": ("orw_w2", {}),
    "tilt": ("tilt", {}),
    "Flow-GRPO": ("flow_grpo", {}),
}
REFERENCE, BEST = "reference", "best of n"
METHODS = (REFERENCE, *TRAINED, BEST)
SHOWN = "ORW-CFM-W2"
COLUMNS = {
    "opinion": ("opinion score", 2),
    "gain": ("gain", 2),
    "dnsmos": ("DNSMOS", 3),
    "wer": ("word error rate", 3),
    "pitch_spread": ("spread of pitch", 2),
    "rate_spread": ("spread of rate", 2),
    "diversity": ("diversity", 2),
    "seconds": ("seconds of CPU", 0),
}
"""Figure -> title, digits."""
Result = dict[str, Any]


class Counted:
    """A listener that counts what it hears."""

    def __init__(self, opinion: Any) -> None:
        self.opinion, self.heard = opinion, 0

    def __call__(self, sounds: torch.Tensor) -> torch.Tensor:
        self.heard += len(sounds)
        return self.opinion(sounds)


class StopAtHeard(IterationCallback):
    """Ends training when the next iteration would have more samples judged than `budget`."""

    def __init__(self, counted: Counted, budget: int) -> None:
        super().__init__()
        self.counted, self.budget, self.rows = counted, budget, []

    def on_iteration_end(self) -> bool:
        self.rows.append([self.counted.heard, self.model.last_logged.get("rollout/reward_mean")])
        print("  ", *self.rows[-1], flush=True)
        last = self.counted.heard - (self.rows[-2][0] if len(self.rows) > 1 else 0)
        return self.counted.heard + min(last, self.model.config.n_samples) <= self.budget


def figures(env: Any, samples: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor | None, every: int) -> Result:
    """What judges say of samples (the unseen ones of one in `every`), and how different they are."""
    contexts = [env.contexts[i] for i in ids.tolist()]
    reward = env.evaluate(samples, ids).reward if scores is None else scores
    errors = env.errors(samples[::every], contexts[::every])
    narrow = env.errors_of_all(samples, contexts, 0)
    return {
        "opinion": reward.mean().item(),
        "interval": mean_interval(reward),
        "by_sentence": {text: reward[ids == i].mean().item() for i, text in enumerate(env.contexts)},
        "dnsmos": 5 - errors["DNSMOS below 5"].mean().item(),
        "wer": errors["word error rate"].mean().item(),
        "pitch_spread": 1 / narrow["narrowness of pitch"],
        "rate_spread": 1 / narrow["narrowness of rate"],
        "diversity": diversity(samples, ids).item(),
    }


def run(method: str, seed: int, args: argparse.Namespace) -> tuple[Result, torch.Tensor, torch.Tensor]:
    """Figures of a method, its samples (n, 3, WORDS) and their contexts (n,)."""
    started = time.process_time()
    env, model, rows = flowrl.make("speech-mos"), None, []
    env.opinion = counted = Counted(env.opinion)
    if method in TRAINED:
        algo, settings = TRAINED[method]
        model = flowrl.algorithm_class(algo)("FlowPolicy", env, seed=seed, device="cpu", **{**settings, **args.set})
        stop = StopAtHeard(counted, args.budget)
        model.learn(UNBOUNDED, callback=stop)
        policy, rows = model.policy, stop.rows
    else:
        policy = flowrl.FlowPolicy.of(env, device="cpu", seed=seed)
    heard = counted.heard
    generator = torch.Generator().manual_seed(10_000 + seed)
    n, each = args.samples, args.budget // args.samples
    ids = torch.arange(len(env.contexts)).repeat_interleave(n // len(env.contexts))
    noise = policy.noise(len(ids), generator)
    role = policy.sampling_role if model else "reference"
    if method == BEST:
        ids_of_all = ids.repeat_interleave(each)
        drawn = policy.sample_latents(ids_of_all, x_0=policy.noise(len(ids_of_all), generator), role=role)
        many = policy.decode(drawn).detach()
        reward = env.evaluate(many, ids_of_all).reward.view(-1, each)
        best, heard = reward.argmax(1), counted.heard
        samples, scores = many.view(-1, each, *many.shape[1:])[torch.arange(len(ids)), best], reward.max(1).values
    else:
        samples, scores = policy.decode(policy.sample_latents(ids, x_0=noise, role=role)).detach(), None
    spent = time.process_time() - started
    found = {
        "method": method,
        "seed": seed,
        "judged": heard,
        "samples": len(ids),
        **figures(env, samples, ids, scores, args.every),
        "seconds": spent,
        "gradient_steps": 0 if model is None else model._n_updates,
        "curve": rows,
    }
    return found, samples, ids


def table(results: Sequence[Result]) -> str:
    """Methods as Markdown: means and standard deviations over seeds; gains are over the reference of the same seed."""
    lines = [f"| method | seeds | samples judged | {' | '.join(title for title, _ in COLUMNS.values())} |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    before = {result["seed"]: result["opinion"] for result in results if result["method"] == REFERENCE}
    for method in METHODS:
        mine = [result for result in results if result["method"] == method]
        if not mine:
            continue
        shown = []
        for key, (_, digits) in COLUMNS.items():
            values = [r["opinion"] - before[r["seed"]] for r in mine if r["seed"] in before] if key == "gain" else None
            values = [r[key] for r in mine] if values is None else values
            shown.append(spread(values, digits) if values and not (key == "gain" and method == REFERENCE) else "")
        seeds = ", ".join(str(r["seed"]) for r in mine)
        lines.append(f"| {method} | {seeds} | {mine[0]['judged']:,} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def shown(name: str, samples: torch.Tensor, ids: torch.Tensor, folder: Path) -> None:
    """Write what `name` draws: a picture of all, and a sound of each sentence."""
    env = flowrl.make("speech-mos")
    image_grid(env.pictures(samples), len(samples) // len(env.contexts)).save(folder / f"{name}.png")
    firsts = torch.tensor([int((ids == i).nonzero()[0]) for i in range(len(env.contexts))])
    sounds = env.sounds(samples[firsts], env.contexts)
    for i, sound in enumerate(sounds):
        save_sound(sound / sound.abs().max() * 0.9, folder / f"{name}-{i}", env.sound_rate)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=768, help="samples that a method has judged")
    parser.add_argument("--samples", type=int, default=64, help="of an evaluation; a multiple of the sentences")
    parser.add_argument("--every", type=int, default=2, help="one in so many is judged by the judges that are unseen")
    parser.add_argument("--set", nargs="*", type=setting, default=[], help="settings of all that is trained, KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    kept_results(parser, args)
    args.set = dict(args.set)
    torch.set_num_threads(1)
    path = args.out / "results.json"
    for seed in args.seeds:
        for method in args.methods:
            results: list[Result] = json.loads(path.read_text()) if path.exists() else []
            if (method, seed) in {(result["method"], result["seed"]) for result in results}:
                continue
            result, samples, ids = run(method, seed, args)
            if seed == args.seeds[0] and method in (REFERENCE, SHOWN):
                shown("before" if method == REFERENCE else "after", samples, ids, args.out)
            results = json.loads(path.read_text()) if path.exists() else []  # another process may have written
            results.append(finite_or_none(result))
            print(json.dumps(result), flush=True)
            write_json(path, results)
            (args.out / "table.md").write_text(table(results))
    pictures = [args.out / f"{name}.png" for name in ("before", "after")]
    if all(picture.exists() for picture in pictures):
        from PIL import Image

        stacked([Image.open(picture) for picture in pictures], 12).save(args.out / "samples.png")


if __name__ == "__main__":
    main()
