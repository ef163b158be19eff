"""What `test_ranks.py` runs in one process and in two: `python ranks_worker.py FILE` writes what each case logged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import flowrl
from flowrl.registry import ALGORITHMS

SMALL: dict[str, Any] = {
    "n_samples": 64,
    "rollout_batch_size": 32,  # two chunks
    "batch_size": 32,
    "n_epochs": 2,
    "accumulation": 3,  # of which the last gradient step of an iteration has fewer
    "group_size": 8,
}
PICTURES: dict[str, Any] = {"n_samples": 16, "batch_size": 8, "rollout_steps": 3, "group_size": 4}


def cases() -> dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Algorithm, environment, its settings, and those of the algorithm, by name."""
    found: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {}
    for name in ALGORITHMS:
        own = {"kl": {"tolerance": 1e-5}, "orw_w2": {"ema_decay": 0.9, "refresh_every": 2}}.get(name, {})
        found[name] = (name, "gaussians-linear", {}, SMALL | own)
        if name in ("orw_w2", "dpok", "flow_grpo"):
            found[f"{name}, LoRA"] = (name, "gaussians-linear", {}, SMALL | own | {"lora_rank": 4})
    found["transport"] = ("orw_w2", "gaussians-linear", {}, SMALL | {"coupling": "ot", "target": "plain"})
    found["branches"] = ("flow_grpo", "gaussians-linear", {}, SMALL | {"branch": True, "window": 2, "ratio": "guard"})
    found["pictures"] = ("orw_w2", "sd3-count", {}, PICTURES)
    found["pictures, LoRA"] = ("flow_grpo", "sd3-count", {}, PICTURES | {"lora_rank": 4})
    mixture = {"reward": "colourfulness:1:running+winrate(count):0.5"}
    found["mixture"] = ("raft", "sd3-count", mixture, PICTURES | {"group_size": 2, "n_best": 1, "lora_rank": 4})
    return found


def run(name: str) -> dict[str, Any]:
    """Train a case for three iterations and evaluate it."""
    algo, env, env_settings, settings = cases()[name]
    model = ALGORITHMS[algo]("FlowPolicy", env, seed=3, device="cpu", env_settings=env_settings, **settings)
    rows = []
    for _ in range(3):
        model.learn(settings["n_samples"], reset_num_timesteps=False)
        rows.append({key: value for key, value in model.last_logged.items() if "per_second" not in key})
    result = flowrl.evaluate(model, 18, batch_size=10, samples_per_context=2)  # of which nothing divides evenly
    weights = torch.stack([p.detach().double().sum() for p in model.policy.parameters_of("current").values()])
    everywhere = model.ranks.all(weights[None], model.ranks.count)
    return {
        "rows": rows,
        "evaluation": {"reward": result.reward_mean, "before": result.reference.reward_mean, "drift": result.drift},
        "cost": result.evaluations_per_sample,
        "own rows of the buffer": len(model.buffer.x_1),
        "ranks agree": bool((everywhere == everywhere[0]).all()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    written = {name: run(name) for name in cases()}
    if flowrl.ranks.join().is_main:
        Path(sys.argv[1]).write_text(json.dumps(written))
