"""What flowrl costs over a hand-written loop: ratios of medians, in one process, measured in turn.

    python benchmarks/overhead.py --out figures.json

Six comparisons:
- a whole ORW-CFM-W2 iteration (rollout, reward, weights, updates, metrics, log) against a bare PyTorch loop that
  does the same arithmetic and nothing else, on the 2-D MLP and on mini-sd3;
- the gradient steps of an iteration alone, on the 2-D MLP with minibatches of 64 and of 512, against that loop's, by
  seconds of the process;
- a rollout on mini-sd3, latents of 32 prompts and images of 256, eager and with compiled blocks, against diffusers' own
  pipeline call; by seconds of the process, which other work on the machine changes little;
- operations of torch of an update and of a rollout, those of a bare loop beside: a GPU that waits for Python waits for
  these. They are counted, not timed;
- drawing and rewarding samples with rewards in a thread, which takes a second core, against one after the other;
- bytes of the rollout buffer against the number of sampler steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bare_loops import ALL, BareLoop
from torch.utils._python_dispatch import TorchDispatchMode

import flowrl
from flowrl.envs.rewards.aesthetic import colourfulness

MLP = {**ALL, "n_samples": 512, "batch_size": 512, "n_epochs": 4, "rollout_steps": 16}
MINI = {
    **ALL,
    "n_samples": 64,
    "group_size": 8,
    "batch_size": 64,
    "n_epochs": 2,
    "rollout_steps": 8,
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


class Operations(TorchDispatchMode):
    """Count of operations that a device would be asked for: views and empty tensors are made without it."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.n += not (is_view or func._schema.name.startswith(("aten::empty", "aten::new_empty")))
        return func(*args, **(kwargs or {}))


def operations_of(work: Callable[[], object]) -> int:
    work()  # what is made once
    with Operations() as counted:
        work()
    return counted.n


def operations(model: flowrl.ORWCFMW2, bare: BareLoop) -> dict[str, float]:
    """Count those of each gradient step, and of each step of the sampler."""
    c = model.config
    ids = torch.arange(c.n_samples) // c.group_size % len(model.policy.contexts)
    x, reward = bare.draw().clone(), torch.randn(c.n_samples)
    n_updates = c.n_epochs * c.n_samples // c.batch_size
    found = {
        "gradient step, flowrl": operations_of(model.update) / n_updates,
        "gradient step, bare": operations_of(lambda: bare.train(x, reward)) / n_updates,
        "sampler step, flowrl": operations_of(lambda: model.policy.sample_latents(ids)) / c.rollout_steps,
        "sampler step, bare": operations_of(lambda: bare.draw(torch.no_grad)) / c.rollout_steps,
    }
    print("operations a " + ", ".join(f"{key} {value:.1f}" for key, value in found.items()), flush=True)
    return found


def mlp(repeats: int) -> dict[str, float]:
    model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, **MLP)
    bare = BareLoop(model, lambda net, x, t, c: net(x, t), lambda x: x[:, 0], lambda x: x)
    return compare("iteration, MLP, batch 512", model, bare, repeats)


def updates(repeats: int, batch_size: int) -> dict[str, float]:
    """Network evaluations per second of gradient steps, over those of the bare loop: median of pairs of calls."""
    settings = {**MLP, "n_samples": 8 * batch_size, "batch_size": batch_size}
    model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, **settings)
    bare = BareLoop(model, lambda net, x, t, c: net(x, t), lambda x: x[:, 0], lambda x: x)
    model.learn(8 * batch_size)
    x, reward = bare.draw().clone(), torch.randn(8 * batch_size)
    ratios = []
    for _ in range(repeats + 1):
        started = time.process_time()
        model.update()
        between = time.process_time()
        bare.train(x, reward)
        ratios.append((time.process_time() - between) / (between - started))
    ratio = statistics.median(ratios[1:])
    print(f"gradient steps, MLP, minibatches of {batch_size}: evaluations a second {ratio:.3f} of the bare loop's")
    return {"ratio": ratio, **operations(model, bare)}


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
    return {**median, "ratio": ratio, **operations(model, bare)}


def rollout(repeats: int, n: int, decoded: bool, steps: int = 16) -> dict[str, dict[str, float]]:
    """Images per second of our sampler, eager and with compiled blocks, and of diffusers' call of as many prompts.

    `decoded`: images; latents otherwise.
    """
    results, what = {}, "images" if decoded else "latents"
    for scale in (1.0, 3.0):
        settings = {"seed": 0, "rollout_steps": steps, "guidance_scale": scale}
        eager, compiled = (
            flowrl.ORWCFMW2("FlowPolicy", "sd3-count", env_settings={"flow": "mini-sd3"}, compile=kind, **settings)
            for kind in ("off", "blocks")
        )
        flow = eager.policy.model
        pipeline = flow.with_encoders(flow.network)  # flowrl releases them once prompts are encoded
        pipeline.set_progress_bar_config(disable=True)
        prompts, index = eager.env.core.contexts[:n], torch.arange(n)

        def theirs(pipeline=pipeline, prompts=prompts, scale=scale, length=flow.max_sequence_length):
            pipeline(
                prompts,
                num_inference_steps=steps,
                guidance_scale=scale,
                output_type="pt" if decoded else "latent",
                max_sequence_length=length,
            )

        def ours(model: flowrl.ORWCFMW2, index: torch.Tensor = index) -> torch.Tensor:
            return (model.policy.sample if decoded else model.policy.sample_latents)(index)

        works = {
            "flowrl": partial(ours, eager),
            "flowrl, blocks compiled": partial(ours, compiled),
            "diffusers": theirs,
        }
        median = in_turn(works, repeats, time.process_time)
        speed = {key: n / value for key, value in median.items()}
        ratios = {f"{key} / diffusers": speed[key] / speed["diffusers"] for key in list(works)[:2]}
        said = ", ".join(f"{key} {value:.1f}" for key, value in speed.items())
        said += "".join(f", {key} {value:.3f}" for key, value in ratios.items())
        print(f"rollout, mini-sd3, {n} {what}, {steps} steps, guidance {scale:g}, a second: {said}", flush=True)
        results[f"guidance {scale:g}"] = {**speed, **ratios}
    return results


def rewards_in_a_thread(repeats: int, n: int = 64, chunk: int = 8) -> dict[str, float]:
    """Seconds of drawing and rewarding by a reward on the host, one after the other over both at once."""
    results = {}
    for env in ("sd3-compress", "sd3-ocr"):
        settings = {"n_samples": n, "rollout_batch_size": chunk, "group_size": 4, "rollout_steps": 8, "seed": 0}
        works = {}
        for overlap in ("off", "on"):
            model = flowrl.ORWCFMW2("FlowPolicy", env, overlap_rewards=overlap, **settings)
            _, callback = model._setup_learn(n, None, True, "", False)
            works[overlap] = lambda m=model, c=callback: m.collect(c)
        median = in_turn(works, repeats)
        results[env] = median["off"] / median["on"]
        print(
            f"drawing and rewarding {n} samples of {env}, {chunk} at once: one after the other {median['off']:.2f} s, "
            f"rewards in a thread {median['on']:.2f} s, ratio {results[env]:.2f}",
            flush=True,
        )
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
        "updates": {str(size): updates(8 * args.repeats, size) for size in (64, 512)},
        "mini_sd3": mini(args.repeats),
        "rollout": rollout(args.repeats, n=32, decoded=False),
        "rollout_of_a_run": rollout(max(args.repeats // 3, 1), n=256, decoded=True),
        "rewards_in_a_thread": rewards_in_a_thread(args.repeats),
        "buffer_bytes": buffer_bytes(),
    }
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
