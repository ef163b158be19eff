"""What checkpoints cost a run, written while training waits or goes on: `python benchmarks/checkpoints.py`.

One iteration with a checkpoint after it, on the 2-D MLP and on mini-sd3, whole and with LoRA: none, in the foreground,
in the background, in turn; medians of the time over an iteration without one. What is written last counts too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import flowrl
from flowrl.runs.callbacks import KeepCheckpoints

PICTURES = {"n_samples": 64, "group_size": 8, "batch_size": 64, "n_epochs": 1, "rollout_steps": 4, "ema_decay": 0.9}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "MLP": ("gaussians-linear", {"n_samples": 512, "batch_size": 512, "n_epochs": 4}),
    "mini-sd3": ("sd3-compress", PICTURES),
    "mini-sd3, LoRA rank 32": ("sd3-compress", {**PICTURES, "lora_rank": 32}),
}
WAYS: dict[str, dict[str, Any]] = {"none": {"every": 0}, "foreground": {"background": False}, "background": {}}


def seconds(model: flowrl.FlowAlgorithm, keep: KeepCheckpoints, iterations: int) -> float:
    """Seconds of an iteration, until everything is written."""
    began = time.perf_counter()
    model.learn(iterations * model.config.n_samples, callback=keep, reset_num_timesteps=False)
    keep.wait()
    return (time.perf_counter() - began) / iterations


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--iterations", type=int, default=3, help="with a checkpoint after each")
    parser.add_argument("--threads", type=int, default=1)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    for name, (env, settings) in CASES.items():
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        flow = {"flow": "mini-sd3"} if env.startswith("sd3") else {}
        model = flowrl.ORWCFMW2("FlowPolicy", env, env_settings=flow, seed=0, device="cpu", **settings)
        with tempfile.TemporaryDirectory() as where:
            for i in range(parsed.repeats + 1):
                for way, options in WAYS.items():
                    keep = KeepCheckpoints(Path(where) / way, **{"every": 1, **options})
                    taken[way].append(seconds(model, keep, parsed.iterations))
                    if i == 0:
                        taken[way].clear()
            newest = max((Path(where) / "foreground").glob("[0-9]*"))
            size = sum(path.stat().st_size for path in newest.rglob("*")) / 1e6
        none, *others = (statistics.median(taken[way]) for way in WAYS)
        added = ", ".join(f"{way} +{1000 * (t - none):.0f} ms" for way, t in zip(list(WAYS)[1:], others))
        print(f"{name}: iteration {1000 * none:.0f} ms, checkpoint of {size:.1f} MB: {added}", flush=True)


if __name__ == "__main__":
    main()
