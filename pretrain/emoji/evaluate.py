"""What the flow "emoji" draws: mean rewards of samples and of the real pictures, and a grid of samples by group.

python pretrain/emoji/evaluate.py
"""

from __future__ import annotations

from pathlib import Path

import torch

import flowrl
from flowrl.envs.emoji import GROUPS, real_emoji
from flowrl.runs.pictures import image_grid

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "emoji-samples.png"
EACH = 12


def main() -> None:
    model = flowrl.ORWCFMW2("FlowPolicy", "emoji-compress", seed=0, device="cpu")
    contexts = torch.arange(len(GROUPS)).repeat_interleave(EACH)
    samples = model.policy.sample(contexts, steps=30)
    env, real = model.env.core, real_emoji().pictures
    for name, pictures, groups in (
        ("samples", samples, contexts),
        ("real pictures", real, torch.zeros(len(real), dtype=torch.long)),  # the reward does not look at the group
    ):
        print(f"{len(pictures)} {name}: mean reward {env.evaluate(pictures, groups).reward.mean():.3f}")
    image_grid(samples, columns=EACH).quantize(128).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
