"""Memory of endpoint and of path methods against the number of sampler steps.

    python benchmarks/memory.py --out figures.json

One iteration of each algorithm on mini-sd3, each in a process of its own: bytes of the rollout buffer, and the most
memory that the process ever held. An endpoint method keeps the finished samples, a path method every noisy step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
from pathlib import Path
from typing import Any

N_SAMPLES = 256
STEPS = (8, 16, 32, 64)
ALGORITHMS = ("orw_w2", "raft", "ddpo", "flow_grpo")


def measure(algo: str, steps: int) -> dict[str, float]:
    """Buffer bytes and peak memory in bytes, of one rollout and four minibatches of updates."""
    import torch

    import flowrl

    torch.set_num_threads(1)
    settings: dict[str, Any] = {"n_samples": N_SAMPLES, "rollout_batch_size": 64, "batch_size": 64, "n_epochs": 1}
    if algo == "orw_w2":  # all weights and steps, as the others; the environment recommends fewer
        settings |= {"trained_parameters": (), "draw_steps": 0}
    model = flowrl.algorithm_class(algo)("FlowPolicy", "sd3-count", seed=0, rollout_steps=steps, **settings)
    whole_pass = model.minibatches  # cut short: further minibatches take no more memory
    model.minibatches = lambda: (batch for batch, _ in zip(whole_pass(), range(4)))
    model.learn(N_SAMPLES)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"algorithm": algo, "steps": steps, "buffer_bytes": model.buffer.nbytes, "peak_bytes": peak}


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    out = parser.parse_args().out
    figures = []
    for algo in ALGORITHMS:
        for steps in STEPS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(measure, (algo, steps))
            figures.append(row)
            print(
                f"{algo:10s} {steps:3d} steps: buffer {row['buffer_bytes'] / 2**20:7.2f} MiB, "
                f"peak {row['peak_bytes'] / 2**20:7.0f} MiB",
                flush=True,
            )
    if out:
        out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
