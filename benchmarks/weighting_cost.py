"""What online reward weighting costs over plain flow-matching fine-tuning: time and memory of an iteration.

    python benchmarks/weighting_cost.py --out figures.json

The yardstick is a bare PyTorch loop that fits the same number of given samples with as many gradient steps and knows
no reward. Against it: gradient steps with weights alone, with the penalty (a forward pass of `v_ref`), with the
residual target (one of `v_old` as well), and a whole iteration with its rollout and reward. Calls are timed in turn,
medians of CPU time; memory is the most that a process of its own holds beyond libraries. Stable Diffusion 3.5 medium by
arithmetic.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bare_loops import ALL
from overhead import in_turn

import flowrl

MIB = 2**20
VARIANTS: dict[str, dict[str, Any]] = {
    "weights": {"alpha": 0.0, "target": "plain"},
    "weights, penalty": {"alpha": 0.3, "target": "plain"},
    "weights, penalty, residual target": {"alpha": 0.3, "target": "residual", "baseline": "clipped"},
}
PLAIN, WHOLE = "plain flow matching, bare loop", "whole iteration with rollout"
SMALL, LARGE = {"n_samples": 512, "batch_size": 128}, {"n_samples": 32, "batch_size": 32}
SHARED: dict[str, Any] = {**ALL, "group_size": 1, "n_epochs": 1, "rollout_steps": 16, "standardise": "none"}
SD3_PARAMETERS = 2.24e9
"""Of the transformer of Stable Diffusion 3.5 medium, counted from its configuration in benchmarks/architectures.py."""


class UNet(torch.nn.Module):
    """diffusers' UNet2DModel as a velocity field of 3 x 16 x 16 pixels."""

    sample_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.network = UNet2DModel(
            sample_size=16,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.network(x, 1000 * (1 - t), return_dict=False)[0]


@flowrl.register_env("brightness-unet", flow=UNet, sample_shape=UNet.sample_shape)
def brightness(x: torch.Tensor, contexts: list[Any]) -> torch.Tensor:
    """Mean of all pixels."""
    return x.mean((1, 2, 3))


def environment(size: str) -> tuple[flowrl.GenerationEnv, dict[str, Any]]:
    """The MLP of the mixtures, an untrained U-Net, or mini-sd3, and settings; compute does not depend on weights."""
    if size == "MLP":
        return flowrl.make("gaussians-linear"), {**SMALL, **SHARED}
    if size == "mini-sd3":
        return flowrl.make("sd3-aesthetic", flow="mini-sd3"), {**LARGE, **SHARED}
    torch.manual_seed(0)
    return flowrl.make("brightness-unet"), {**LARGE, **SHARED}


SIZES = ("MLP", "UNet2DModel", "mini-sd3")


class PlainLoop:
    """Flow matching on given samples and nothing else: no weights, checks, metrics or copies."""

    def __init__(self, env: flowrl.GenerationEnv, settings: dict[str, Any]) -> None:
        self.config = flowrl.ORWCFMW2.configure(recommended=env.recommended, settings=settings)
        self.flow = env.flow.load().train()
        with torch.no_grad():
            self.table = self.flow.encode(env.contexts)
        self.flow.release_encoders()
        self.parameters = list(self.flow.network.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.config.learning_rate, weight_decay=0.0, fused=True)
        self.contexts = torch.arange(self.config.n_samples) % len(env.contexts)
        self.x_1 = torch.randn(self.config.n_samples, *self.flow.latent_shape)

    def steps(self) -> None:
        shape = [-1] + [1] * (self.x_1.ndim - 1)
        for _ in range(self.config.n_epochs):
            for i in torch.randperm(len(self.x_1)).split(self.config.batch_size):
                t, x_0 = torch.rand(len(i)), torch.randn_like(self.x_1[i])
                u = self.x_1[i] - x_0
                v = self.flow(x_0 + t.view(shape) * u, t, tuple(part[self.contexts[i]] for part in self.table))
                loss = (v - u).square().mean()
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
                self.optimizer.step()


def calls(size: str, only: str = "") -> dict[str, Callable[[], object]]:
    """What is timed, by name; or one of them alone, with nothing else built."""
    made: dict[str, Callable[[], object]] = {}
    for name in (PLAIN, *VARIANTS, WHOLE):
        if only not in ("", name):
            continue
        env, settings = environment(size)
        if name == PLAIN:
            made[name] = PlainLoop(env, settings).steps
            continue
        settings |= VARIANTS.get(name, {"alpha": 0.3})
        model = flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device="cpu", **settings)
        n = model.config.n_samples
        model.learn(n)  # fills the buffer
        whole = lambda model=model, n=n: model.learn(n, reset_num_timesteps=False)  # noqa: E731
        made[name] = whole if name == WHOLE else model.update
    return made


def held(size: str, name: str) -> int:
    """The most bytes that building and two calls take, beyond what the process held before."""
    torch.set_num_threads(1)
    before = peak()
    call = calls(size, name)[name]
    for _ in range(2):
        call()
    return peak() - before


def peak() -> int:
    """The most that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(size: str, repeats: int) -> dict[str, Any]:
    """Seconds, memory and ratios to the bare loop of one model."""
    median = in_turn(calls(size), repeats * (8 if size == "MLP" else 1), time.process_time)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flowrl", "overhead", "diffusers", "transformers", "stable_baselines3"])
    memory = {}
    for name in median:
        with context.Pool(1) as pool:
            memory[name] = pool.apply(held, (size, name))
    n = sum(p.numel() for p in environment(size)[0].flow.skeleton().network.parameters())
    print(f"{size}, {n:,} parameters", flush=True)
    for name, seconds in median.items():
        print(
            f"  {name}: {seconds:.4f} s ({seconds / median[PLAIN]:.2f}), "
            f"{memory[name] / MIB:.0f} MiB ({memory[name] / memory[PLAIN]:.2f})",
            flush=True,
        )
    return {"parameters": n, "seconds": median, "bytes": memory}


def arithmetic(n_epochs: int = 1, rollout_steps: int = 16) -> dict[str, Any]:
    """Forward passes per sample of an iteration (a backward is two), and bytes of weights, for a model of any size."""
    passes = {PLAIN: 3 * n_epochs, "weights": 3 * n_epochs, "weights, penalty": 4 * n_epochs}
    passes["weights, penalty, residual target"] = 5 * n_epochs
    passes[WHOLE] = rollout_steps + 5 * n_epochs
    full = 4 * 4 * SD3_PARAMETERS  # weights, gradients, two moments in float32
    return {
        "passes_per_sample": passes,
        "ratio": {name: value / passes[PLAIN] for name, value in passes.items()},
        "sd3.5-medium, bytes": {
            "plain, all weights": full,
            "with v_ref and v_old, all weights": full + 2 * 4 * SD3_PARAMETERS,
        },
    }


def main() -> None:
    """Measure, print, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {size: measure(size, args.repeats) for size in args.sizes}
    figures["arithmetic"] = arithmetic()
    print(json.dumps(figures["arithmetic"], indent=1))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
