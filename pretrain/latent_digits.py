"""Train the generator behind "latent-digits": a small GAN of real handwritten digits, 8x8.

    python pretrain/latent_digits.py

A Wasserstein GAN with a one-sided gradient penalty (Gulrajani et al. 2017, arXiv 1704.00028), both networks plain
perceptrons; what ships is a moving average of the generator. The pictures are those that `pretrain/digits.py` trains
its flow on, the judge is its held-out classifier. The velocity network beside it starts at zero and is not trained.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from digits import SOURCE
from fit_flow import as_shipped, save
from safetensors.torch import save_file
from torch import nn

from flowrl.envs.digits import SPLIT_SEED, Digits, real_digits
from flowrl.envs.rewards.even import CLASSES, DigitClassifier, load_classifier
from flowrl.functional.metrics import wasserstein2
from flowrl.models.decoder import PictureDecoder
from flowrl.models.prior import PriorFlow
from flowrl.models.source import ASSETS

SIZE, CRITIC_WIDTH, CRITIC_STEPS, PENALTY, LEARNING_RATE, DECAY = 8, 256, 3, 3.0, 3e-4, 0.999


class Critic(nn.Module):
    """Pictures (B, 1, size, size) in [0, 1] -> how real they look (B,)."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Linear(CRITIC_WIDTH, CRITIC_WIDTH)
        self.layers = nn.Sequential(
            *(nn.Flatten(), nn.Linear(SIZE**2, CRITIC_WIDTH), nn.LeakyReLU(0.2)),
            *(inner, nn.LeakyReLU(0.2), nn.Linear(CRITIC_WIDTH, 1)),
        )

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.layers(2 * pictures - 1).squeeze(1)


def penalty(critic: Critic, real: torch.Tensor, made: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """How far the critic's slope exceeds one, between real and made pictures."""
    u = torch.rand(len(real), 1, 1, 1, generator=generator)
    between = (u * real + (1 - u) * made).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).clamp_min(0).square().mean()


def train(data: Digits, test: Digits, judge: DigitClassifier, args: argparse.Namespace) -> PictureDecoder:
    """The moving average of a generator that a critic was trained against."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    decoder = PictureDecoder(args.dim, SIZE, args.width, args.depth)
    critic, average = Critic(), copy.deepcopy(decoder)
    optimizers = [
        torch.optim.Adam(network.parameters(), LEARNING_RATE, betas=(0.0, 0.9), fused=True)
        for network in (decoder, critic)
    ]

    def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor, k: int) -> None:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - k / args.steps) + 1e-5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    started = time.process_time()
    for k in range(args.steps):
        for _ in range(CRITIC_STEPS):
            real = data.pictures[torch.randint(len(data.labels), (args.batch,), generator=generator)]
            with torch.no_grad():
                made = decoder(torch.randn(args.batch, args.dim, generator=generator))
            difference = critic(made).mean() - critic(real).mean()
            step(optimizers[1], difference + PENALTY * penalty(critic, real, made, generator), k)
        step(optimizers[0], -critic(decoder(torch.randn(args.batch, args.dim, generator=generator))).mean(), k)
        with torch.no_grad():
            share = 1 - min(DECAY, (1 + k) / (10 + k))
            torch._foreach_lerp_(list(average.parameters()), list(decoder.parameters()), share)
        if (k + 1) % 1000 == 0:
            spent = time.process_time() - started
            print(f"step {k + 1} {described(average, args.dim, judge, test)} {spent:.0f} s of CPU", flush=True)
    return average


@torch.inference_mode()
def described(decoder: PictureDecoder, dim: int, judge: DigitClassifier, test: Digits) -> dict[str, Any]:
    """What the generator draws, beside test pictures it has not seen."""
    drawn = decoder(torch.randn(2000, dim, generator=torch.Generator().manual_seed(1)))
    probability = judge(drawn).softmax(1)
    shares = torch.bincount(probability.argmax(1), minlength=CLASSES) / len(drawn)
    n = len(test.labels) // 2
    real = test.pictures[torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(1))].flatten(1)
    return {
        "w2": round(wasserstein2(drawn[:n].flatten(1), real[:n]), 3),
        "w2_floor": round(wasserstein2(real[n : 2 * n], real[:n]), 3),
        "sure": round((probability.amax(1) > 0.9).float().mean().item(), 3),
        "sure_of_test_pictures": round((judge(test.pictures).softmax(1).amax(1) > 0.9).float().mean().item(), 3),
        "shares": [round(share, 3) for share in shares.tolist()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "latent-digits")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dim", type=int, default=16, help="of z")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=3, help="hidden layers of the generator")
    parser.add_argument("--network-width", type=int, default=128, help="of the velocity network")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data, test = real_digits()
    judge = load_classifier(ASSETS / "digits" / "judge")
    decoder = as_shipped(train(data, test, judge, args))
    figures = described(decoder, args.dim, judge, test)
    print(figures)
    torch.manual_seed(args.seed)
    flow = PriorFlow(decoder, args.dim, width=args.network_width)
    config = {
        "model": "latent",
        "dim": args.dim,
        "width": args.network_width,
        "depth": 3,
        "decoder": {"size": SIZE, "width": args.width, "depth": args.depth},
        "description": f"{args.dim} latents of a GAN trained on {len(data.labels):,} pictures of handwritten digits",
        "data": SOURCE,
        "trained": {
            "pictures": f"all {len(data.labels)} training pictures: those after the first {len(test.labels)} in the "
            f"order of torch.randperm with seed {SPLIT_SEED}",
            "steps": args.steps,
            "batch": args.batch,
            "seed": args.seed,
        },
        **figures,
    }
    save(flow.network, args.out, config)
    save_file(
        {name: tensor.half().contiguous() for name, tensor in decoder.state_dict().items()},
        args.out / "decoder.safetensors",
    )


if __name__ == "__main__":
    main()
