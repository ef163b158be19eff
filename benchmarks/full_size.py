"""One iteration of ORW-CFM-W2 on the architecture of Stable Diffusion 3 medium, with random weights, on the CPU.

    python benchmarks/full_size.py --out figures.json
    python benchmarks/full_size.py --pipeline Qwen/Qwen-Image --layers 2 --resolution 256

Whether the full size fits and works, what it takes, and how near the prediction of a dry run comes: 24 layers of 24
heads of 64, bfloat16, 512 x 512 pixels, LoRA rank 32; 2 samples, 2 sampler steps, 1 gradient step. No weight is
downloaded; T5 is left out, as Stable Diffusion 3 allows. Takes minutes and about 10 GiB. Another pipeline of
benchmarks/architectures.py at full width, with fewer layers, takes less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures

GIB = 2**30
SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
PROMPTS = ("a photo of a cat", "a photo of a dog")
TOKENS = 64
"""Of a prompt, for all but Stable Diffusion 3."""
DEPTHS = ("num_layers", "n_layers", "num_single_layers", "num_hidden_layers", "depth")
SETTINGS: dict[str, Any] = {
    "n_samples": 2,
    "rollout_batch_size": 2,
    "group_size": 2,
    "batch_size": 2,
    "n_epochs": 1,
    "rollout_steps": 2,
    "guidance_scale": 1.0,
    "lora_rank": 32,
    "precision": "bfloat16",
}


def main() -> None:
    """Predict, run, print, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="compute activations again")
    parser.add_argument("--pipeline", default=SD3, choices=sorted(architectures.PIPELINES), help="architecture")
    parser.add_argument("--layers", type=int, default=0, help="layers of each network at most; 0 keeps all")
    parser.add_argument("--resolution", type=int, default=512, help="pixels along a side")
    parser.add_argument("--predict-only", action="store_true", help="only what the dry run predicts")
    args = parser.parse_args()

    import flowrl
    from flowrl.training.memory_plan import predict_memory

    settings = {**SETTINGS, "gradient_checkpointing": args.gradient_checkpointing}
    with tempfile.TemporaryDirectory() as name:
        flow = architectures.write(
            args.pipeline, Path(name), shallow(args.pipeline, args.layers) if args.layers else {}
        )
        env_settings = {"t5": False} if args.pipeline == SD3 else {"sequence_length": TOKENS}
        env = flowrl.make("sd3-compress", flow=flow, resolution=args.resolution, prompts=PROMPTS, **env_settings)
        config = flowrl.ORWCFMW2.configure(recommended=env.recommended, settings=settings)
        plan = predict_memory(flowrl.ORWCFMW2, config, env)
        figures: dict[str, Any] = {"predicted": {**plan.parts, **plan.phases, "libraries": plan.libraries}}
        for key, size in figures["predicted"].items():
            print(f"predicted {key}: {size / GIB:.2f} GiB", flush=True)
        if plan.missing:
            sys.exit(f"could not be predicted: {plan.missing}")
        figures["predicted_peak"] = plan.peak + plan.libraries
        if not args.predict_only:
            figures["phases"] = run(flowrl, env, config)
            figures["measured_peak"] = peak()
            ratio = figures["predicted_peak"] / figures["measured_peak"]
            print(f"peak: {peak() / GIB:.2f} GiB, predicted {plan.peak / GIB + plan.libraries / GIB:.2f} ({ratio:.2f})")
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


def shallow(name: str, layers: int) -> architectures.Configs:
    """Changes of a pipeline's configurations that leave each network so many layers at most."""

    def cut(config: dict[str, Any]) -> dict[str, Any]:
        cuts = {key: min(layers, config[key]) for key in DEPTHS if isinstance(config.get(key), int)}
        return cuts | {key: {**value, **cut(value)} for key, value in config.items() if isinstance(value, dict)}

    configs = architectures.PIPELINES[name].items()
    return {file: cut(config) for file, config in configs if not file.startswith(("vae", "model_index"))}


def run(flowrl: Any, env: Any, config: Any) -> dict[str, dict[str, float]]:
    """Seconds of each phase, and the most memory until its end."""
    env.flow = replace(env.flow, load=env.flow.imitation)  # outside of a prediction: real modules, random weights
    phases: dict[str, dict[str, float]] = {}

    def timed(name: str, work: Any) -> Any:
        started = time.perf_counter()
        result = work()
        phases[name] = {"seconds": time.perf_counter() - started, "peak_bytes": peak()}
        print(f"{name}: {phases[name]['seconds']:.0f} s, {peak() / GIB:.2f} GiB at most so far", flush=True)
        return result

    from stable_baselines3.common.callbacks import CallbackList

    model = timed("building, encoding prompts", lambda: flowrl.ORWCFMW2("FlowPolicy", env, config=config, seed=0))
    parameters = sum(p.numel() for p in model.policy.model.network.parameters())
    print(f"{parameters / 1e9:.2f} billion parameters, adapters included")
    callback = CallbackList([])
    model._setup_learn(config.n_samples, callback, True, "", False)
    timed("drawing, decoding, scoring", lambda: model.collect(callback))
    measured = timed("training", model.update)
    print({key: round(value.item(), 4) for key, value in measured.items()})
    assert all(bool(value.isfinite()) for value in measured.values())
    return phases


def peak() -> int:
    """The most that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        # glibc would keep what is freed in pieces below 32 MB; it reads this when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"})
    main()
