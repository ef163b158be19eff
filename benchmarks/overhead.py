"""What flowrl costs over a hand-written loop: ratios of medians, in one process, measured in turn.

    python benchmarks/overhead.py --out figures.json

Three comparisons:
- a whole ORW-CFM-W2 iteration (rollout, reward, weights, updates, metrics, log) against a bare PyTorch loop that
  does the same arithmetic and nothing else, on the 2-D MLP and on mini-sd3;
- images per second of a rollout on mini-sd3 against diffusers' own pipeline call;
- bytes of the rollout buffer against the number of sampler steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bare_loops import BareLoop

import flowrl
from flowrl.envs.rewards.aesthetic import colourfulness

MLP = {"n_samples": 512, "batch_size": 512, "n_epochs": 4, "rollout_steps": 16}
MINI = {
    "n_samples": 64,
    "group_size": 8,
    "batch_size": 64,
    "n_epochs": 2,
    "rollout_steps": 8,
    "ema_decay": 0.0,
}


def in_turn(
    pairs: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each function, called in turn; one uncounted call of each first."""
    seconds: dict[str, list[float]] = {name: [] for name in pairs}
    for i in range(repeats + 1):
        for name, function in pairs.items():
            started = clock()
            function()
            if i:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def whole_iteration(model: flowrl.ORWCFMW2) -> Callable[[], object]:
    n = model.config.n_samples
    return lambda: model.learn(n, reset_num_timesteps=False)


def mlp(repeats: int) -> dict[str, float]:
    model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, **MLP)
    bare = BareLoop(model, lambda net, x, t, c: net(x, t), lambda x: x[:, 0], lambda x: x)
    return compare("iteration, MLP, batch 512", model, bare, repeats)


def mini(repeats: int) -> dict[str, float]:
    model = flowrl.ORWCFMW2(
        "FlowPolicy", "sd3-aesthetic", env_settings={"flow": "mini-sd3"}, seed=0, standardise="none", **MINI
    )

    def call(net, x, t, c):
        return -net(
            hidden_states=x, timestep=1000 * (1 - t), encoder_hidden_states=c[0], pooled_projections=c[1],
            return_dict=False,
        )[0]  # fmt: skip

    bare = BareLoop(model, call, lambda x: colourfulness(x) / 100, model.policy.model.decode)
    return compare("iteration, mini-sd3, batch 64", model, bare, repeats)


def compare(name: str, model: flowrl.ORWCFMW2, bare: BareLoop, repeats: int) -> dict[str, float]:
    median = in_turn({"flowrl": whole_iteration(model), "bare": bare.iteration}, repeats)
    ratio = median["flowrl"] / median["bare"]
    print(f"{name}: flowrl {median['flowrl']:.4f} s, bare {median['bare']:.4f} s, ratio {ratio:.3f}", flush=True)
    return {**median, "ratio": ratio}


def rollout(repeats: int, steps: int = 16, n: int = 32) -> dict[str, dict[str, float]]:
    """Images per second of our sampler and of diffusers' pipeline call, latents only."""
    results = {}
    for scale in (1.0, 3.0):
        model = flowrl.ORWCFMW2(
            "FlowPolicy",
            "sd3-count",
            env_settings={"flow": "mini-sd3"},
            seed=0,
            rollout_steps=steps,
            guidance_scale=scale,
        )
        flow = model.policy.model
        pipeline = flow.with_encoders(flow.network)  # flowrl releases them once prompts are encoded
        pipeline.set_progress_bar_config(disable=True)
        prompts, index = model.env.core.contexts[:n], torch.arange(n)

        def theirs(pipeline=pipeline, prompts=prompts, scale=scale, length=model.policy.model.max_sequence_length):
            pipeline(
                prompts,
                num_inference_steps=steps,
                guidance_scale=scale,
                output_type="latent",
                max_sequence_length=length,
            )

        median = in_turn({"flowrl": lambda m=model, i=index: m.policy.sample_latents(i), "diffusers": theirs}, repeats)
        speed = {key: n / value for key, value in median.items()}
        ratio = speed["flowrl"] / speed["diffusers"]
        print(
            f"rollout, mini-sd3, {steps} steps, guidance {scale:g}: flowrl {speed['flowrl']:.1f} images/s, "
            f"diffusers {speed['diffusers']:.1f} images/s, ratio {ratio:.3f}",
            flush=True,
        )
        results[f"guidance {scale:g}"] = {**speed, "ratio": ratio}
    return results


def buffer_bytes() -> dict[int, int]:
    sizes = {}
    for steps in (4, 16, 64):
        model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, **{**MLP, "rollout_steps": steps})
        sizes[steps] = model.buffer.nbytes
    print("rollout buffer, bytes by sampler steps:", sizes)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    figures = {
        "threads": torch.get_num_threads(),
        "mlp": mlp(8 * args.repeats),
        "mini_sd3": mini(args.repeats),
        "rollout": rollout(args.repeats),
        "buffer_bytes": buffer_bytes(),
    }
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
