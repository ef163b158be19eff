"""Train the flow "digits" and the two classifiers of `digits-even`: small networks on real handwritten digits.

    python pretrain/digits.py                                       # scikit-learn's digits, 8x8: what ships
    python pretrain/digits.py --data-dir MNIST --out runs/mnist     # MNIST, 28x28, from its four idx files

The flow learns all training pictures; each classifier one half of them, so that what one takes for an even digit by
mistake the other need not. Accuracy is measured on the test pictures, which none of the three has seen.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from fit_flow import as_shipped, fit, save
from torch import nn

from flowrl.envs.digits import SPLIT_SEED, Digits, real_digits
from flowrl.envs.rewards.even import CLASSES, DigitClassifier
from flowrl.functional.metrics import wasserstein2
from flowrl.functional.solvers import ode_sample, time_grid
from flowrl.models.unet import UNetFlow, UNetShape, to_latents

ASSET = Path(__file__).resolve().parent.parent / "flowrl" / "assets" / "digits"
SOURCE = "scikit-learn's load_digits: UCI Optical Recognition of Handwritten Digits, CC BY 4.0"


def distorted(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures turned by up to 12 degrees, scaled and moved by up to a tenth, with noise and another contrast."""
    n = len(pictures)

    def uniform(*shape: int) -> torch.Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    angle, scale = uniform(n) * math.radians(12), 1 + 0.1 * uniform(n)
    rows = torch.stack([angle.cos() * scale, -angle.sin(), angle.sin(), angle.cos() * scale], dim=1).view(n, 2, 2)
    affine = torch.cat([rows, 0.15 * uniform(n, 2, 1)], dim=2)
    grid = nn.functional.affine_grid(affine, list(pictures.shape), align_corners=False)
    moved = nn.functional.grid_sample(pictures, grid, align_corners=False, padding_mode="zeros")
    noise = 0.05 * torch.randn(moved.shape, generator=generator)
    return (moved * (1 + 0.15 * uniform(n, 1, 1, 1)) + noise).clamp(0, 1)


def train_classifier(kind: str, width: int, data: Digits, steps: int, batch: int, seed: int) -> DigitClassifier:
    """A classifier trained on distorted pictures."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = DigitClassifier(kind, data.pictures.shape[-1], width, dropout=0.3)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        pictures, labels = data.at(torch.randint(len(data.labels), (batch,), generator=generator))
        logits = network(distorted(pictures, generator))
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return as_shipped(network).eval()


@torch.inference_mode()
def measured(network: DigitClassifier, test: Digits) -> dict[str, float]:
    """Share of right digits, and of right answers to whether they are even."""
    probability = torch.cat([network(part) for part in test.pictures.split(1000)]).softmax(dim=1)
    is_even = probability[:, ::2].sum(1) > 0.5
    return {
        "test_accuracy": round((probability.argmax(1) == test.labels).float().mean().item(), 4),
        "test_accuracy_even": round((is_even == (test.labels % 2 == 0)).float().mean().item(), 4),
    }


def classifiers(train: Digits, test: Digits, args: argparse.Namespace, source: str) -> dict[str, DigitClassifier]:
    """Train and save both."""
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(SPLIT_SEED + 1))
    halves = order.chunk(2)
    networks = {}
    for name, kind, width, half in (("reward", "cnn", 16, 0), ("judge", "mlp", 160, 1)):
        started, data = time.perf_counter(), train.at(halves[half])
        seed = args.seed + half
        network = train_classifier(kind, width, data, args.classifier_steps, args.batch, seed)
        accuracy = measured(network, test)
        print(f"{name} ({kind}): {accuracy}, {time.perf_counter() - started:.0f} s", flush=True)
        config: dict[str, Any] = {
            "kind": kind,
            "size": train.pictures.shape[-1],
            "width": width,
            "data": source,
            "trained": {
                "pictures": f"{'first' if half == 0 else 'second'} half of the training pictures, in the order of "
                f"torch.randperm with seed {SPLIT_SEED + 1} ({len(data.labels)})",
                "steps": args.classifier_steps,
                "batch": args.batch,
                "seed": seed,
            },
            "test_pictures": len(test.labels),
            **accuracy,
        }
        save(network, args.out / name, config)
        networks[name] = network
    return networks


@torch.inference_mode()
def described(flow: UNetFlow, judge: DigitClassifier, test: Digits) -> dict[str, Any]:
    """What the flow draws, beside test pictures it has not seen."""
    n, generator = min(2000, len(test.labels)), torch.Generator().manual_seed(1)
    x_0 = torch.randn(n, *flow.latent_shape, generator=generator)
    drawn = flow.decode(ode_sample(lambda x, t: flow(x, t, ()), x_0, time_grid(50), "euler"))
    shares = torch.bincount(judge(drawn).argmax(1), minlength=CLASSES) / n
    real = test.pictures[torch.randperm(len(test.labels), generator=generator)[:n]]
    half = n // 2
    return {
        "w2": round(wasserstein2(drawn[:half].flatten(1), real[:half].flatten(1)), 3),
        "w2_floor": round(wasserstein2(real[half : 2 * half].flatten(1), real[:half].flatten(1)), 3),
        "sure": round((judge(drawn).softmax(1).amax(1) > 0.9).float().mean().item(), 3),
        "sure_of_test_pictures": round((judge(test.pictures).softmax(1).amax(1) > 0.9).float().mean().item(), 3),
        "shares": [round(share, 3) for share in shares.tolist()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="", help="MNIST's idx files; scikit-learn's digits if not given")
    parser.add_argument("--out", type=Path, default=ASSET)
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--classifier-steps", type=int, default=2_500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--patch", type=int, default=0, help="0: 1 for pictures of 8 pixels, 2 for larger ones")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.data_dir and args.out == ASSET:
        parser.error("--data-dir needs --out FOLDER: the shipped flow stays as it is.")
    train, test = real_digits(args.data_dir)
    size = train.pictures.shape[-1]
    source = f"MNIST idx files, {size}x{size}" if args.data_dir else SOURCE
    networks = classifiers(train, test, args, source)

    torch.manual_seed(args.seed)
    shape = UNetShape(channels=1, size=size, widths=tuple(args.widths), patch=args.patch or (2 if size > 8 else 1))
    latents = to_latents(train.pictures)

    def draw(n: int, generator: torch.Generator) -> tuple[torch.Tensor, tuple[()]]:
        return latents[torch.randint(len(latents), (n,), generator=generator)], ()

    flow = fit(UNetFlow(shape), draw, args.steps, args.batch, args.seed)
    as_shipped(flow.network)
    figures = described(flow, networks["judge"], test)
    print(figures)
    config = {
        "model": "unet",
        "channels": 1,
        "size": size,
        "widths": args.widths,
        "patch": shape.patch,
        "description": f"U-Net trained on {len(train.labels):,} pictures of handwritten digits",
        "data": source,
        "trained": {
            "pictures": f"all {len(train.labels)} training pictures: "
            + (
                "train-images-idx3-ubyte"
                if args.data_dir
                else f"those after the first {len(test.labels)} in the order of torch.randperm with seed {SPLIT_SEED}"
            ),
            "steps": args.steps,
            "batch": args.batch,
            "seed": args.seed,
        },
        **figures,
    }
    save(flow.network, args.out, config)


if __name__ == "__main__":
    main()
