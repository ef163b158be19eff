"""Train the flow "darcy": a small U-Net on random permeabilities and the pressures that a sparse solver gives for them.

    python pretrain/darcy.py                                    # 32 x 32 nodes: what ships
    python pretrain/darcy.py --size 64 --out runs/darcy-64      # the same at 64 x 64

The data are solved once; turned and mirrored pairs, which solve the equation as well, are drawn from them. A tenth of
them come without their kind, for classifier-free guidance. The flow knows nothing of the equation but the scale of its
latents (`flowrl/models/darcy.py`).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from fit_flow import as_shipped, fit, save

from flowrl.envs.darcy_data import CONTRAST, KINDS, solved_pairs
from flowrl.functional.darcy import residual, solve
from flowrl.functional.solvers import ode_sample, time_grid
from flowrl.models.base import VelocityModel
from flowrl.models.darcy import DarcyFlow
from flowrl.models.unet import UNetShape

ASSET = Path(__file__).resolve().parent.parent / "flowrl" / "assets" / "darcy"
WITHOUT_KIND = 0.1


def turned(pairs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each of the pairs (B, 2, n, n) turned and mirrored at random: one of the eight symmetries of the square."""
    for move in (lambda x: x.flip(2), lambda x: x.flip(3), lambda x: x.transpose(2, 3)):
        chosen = torch.rand(len(pairs), generator=generator) < 0.5
        pairs = torch.where(chosen[:, None, None, None], move(pairs), pairs)
    return pairs


@torch.no_grad()
def described(flow: DarcyFlow, n: int = 256, steps: int = 20) -> dict[str, Any]:
    """How well the flow's samples solve the equation: means over each kind."""
    generator, kinds = torch.Generator().manual_seed(1), torch.arange(n) % len(KINDS)
    x_0 = torch.randn(n, *flow.latent_shape, generator=generator)
    drawn = torch.cat(
        [
            flow.decode(ode_sample(lambda x, t, k=k: flow(x, t, (k,)), x, time_grid(steps), "euler"))
            for x, k in zip(x_0.split(64), kinds.split(64))
        ]
    )
    log_k, p = drawn.unbind(1)
    squares = residual(log_k, p).square().mean((1, 2))
    solved = solve(log_k)
    error = (p - solved).flatten(1).norm(dim=1) / solved.flatten(1).norm(dim=1)
    return {
        kind: {
            "mean_squared_residual": round(squares[kinds == i].mean().item(), 4),
            "relative_error_of_p": round(error[kinds == i].mean().item(), 4),
            "log_k_std": round(log_k[kinds == i].std().item(), 3),
        }
        for i, kind in enumerate(KINDS)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32, help="nodes along a side")
    parser.add_argument("--pairs", type=int, default=6144)
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--until", type=int, default=3_000, help="step to stop at, on the schedule of all --steps")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 64])
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--order", type=float, default=1.5, help="derivatives of p that latents have")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=256, help="drawn in the end, to say how well they solve")
    parser.add_argument("--out", type=Path, default=ASSET)
    args = parser.parse_args()
    args.until = min(args.until, args.steps)
    if args.size != 32 and args.out == ASSET:
        parser.error("--size needs --out FOLDER: the shipped flow stays as it is.")
    started = time.process_time()
    pairs, kinds = solved_pairs(args.pairs, args.size, torch.Generator().manual_seed(args.seed))
    cost = (time.process_time() - started) / args.pairs
    print(f"{args.pairs} pairs, {1000 * cost:.1f} ms of CPU each", flush=True)
    shape = UNetShape(2, args.size, tuple(args.widths), patch=args.patch, classes=KINDS)
    plain = DarcyFlow(shape, 1.0, args.order, CONTRAST)
    scale = plain.encode_samples(pairs)[:, 1].std().item()
    torch.manual_seed(args.seed)
    flow = DarcyFlow(shape, scale, args.order, CONTRAST)
    latents = flow.encode_samples(pairs)

    def draw(n: int, generator: torch.Generator) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
        index = torch.randint(len(latents), (n,), generator=generator)
        without = torch.rand(n, generator=generator) < WITHOUT_KIND
        return turned(latents[index], generator), (kinds[index].masked_fill(without, len(KINDS)),)

    config: dict[str, Any] = {
        "model": "darcy",
        "size": args.size,
        "widths": args.widths,
        "patch": args.patch,
        "classes": list(KINDS),
        "scale": scale,
        "order": args.order,
        "log_scale": CONTRAST,
        "description": f"U-Net trained on {args.pairs:,} solved pairs of {args.size}x{args.size} nodes",
        "trained": {"pairs": args.pairs, "steps": args.until, "of": args.steps, "batch": args.batch, "seed": args.seed},
    }

    def keep(average: VelocityModel) -> None:
        save(average.network, args.out, config)

    trained = fit(flow, draw, args.steps, args.batch, args.seed, bfloat16=True, keep=keep, until=args.until)
    as_shipped(trained.network)
    assert isinstance(trained, DarcyFlow)
    figures = described(trained, args.samples)
    print(figures, f"{time.process_time() - started:.0f} s of CPU", flush=True)
    save(trained.network, args.out, config | {"samples": figures})


if __name__ == "__main__":
    main()
