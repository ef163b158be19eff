"""Train the flow "emoji": a small U-Net on Noto emoji of 32x32 pixels, conditioned on their group.

    python pretrain/emoji/train.py

Plain flow matching in pixel space on the pictures of `emoji.png` and their mirror images; a tenth of them without
their group, for classifier-free guidance.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fit_flow import fit, save

from flowrl.envs.emoji import FOLDER, GROUPS, SIZE, real_emoji
from flowrl.models.base import VelocityModel
from flowrl.models.unet import UNetFlow, UNetShape, to_latents

WITHOUT_GROUP = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 48, 64])
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    emoji = real_emoji()
    latents, groups = to_latents(emoji.pictures), torch.tensor([GROUPS.index(group) for group in emoji.groups])
    torch.manual_seed(args.seed)
    flow = UNetFlow(UNetShape(3, SIZE, tuple(args.widths), patch=args.patch, classes=GROUPS))

    def draw(n: int, generator: torch.Generator) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
        index = torch.randint(len(latents), (n,), generator=generator)
        mirror, without = torch.rand(2, n, generator=generator)
        x_1 = torch.where((mirror < 0.5)[:, None, None, None], latents[index].flip(3), latents[index])
        return x_1, (groups[index].masked_fill(without < WITHOUT_GROUP, len(GROUPS)),)

    def keep(average: VelocityModel) -> None:
        config = {
            "model": "unet",
            "channels": 3,
            "size": SIZE,
            "widths": args.widths,
            "patch": args.patch,
            "classes": list(GROUPS),
            "description": f"U-Net trained on {len(latents):,} Noto emoji of 32x32 pixels",
            "data": "Noto Emoji by Google, Apache-2.0: emoji.png, all of them",
            "trained": {"steps": args.steps, "batch": args.batch, "seed": args.seed},
        }
        save(average.network, args.out, config)

    keep(fit(flow, draw, args.steps, args.batch, args.seed, bfloat16=True, keep=keep))


if __name__ == "__main__":
    main()
