"""Measures mini-spatial, and draws docs/images/mini-spatial-grid.png: python pretrain/mini_spatial/evaluate.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline

from flowrl.envs.rewards.spatial import SpatialReward
from flowrl.envs.spatial import all_pairs, draw_pair, pair_prompts
from flowrl.runs.pictures import image_grid

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "flowrl" / "assets" / "mini-spatial"
SHOWN = (
    "a red circle left of a blue square",
    "a green cross above a yellow circle",
    "a blue triangle right of a red square",
    "a yellow square below a green triangle",
)


def drawn(pipe: StableDiffusion3Pipeline, prompts: list[str], seed: int) -> torch.Tensor:
    """Pictures (n, 3, 64, 64) in [0, 1] of the prompts: 20 Euler steps, no guidance."""
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": 20, "guidance_scale": 1.0, "max_sequence_length": 1, "output_type": "pt"}
    parts = [pipe(prompts[i : i + 192], generator=generator, **options).images for i in range(0, len(prompts), 192)]
    return torch.cat(parts).float()


@torch.no_grad()
def decoded(autoencoder: AutoencoderTiny, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures in [0, 1] after encoding and decoding."""
    return (autoencoder.decode(autoencoder.encode(pictures * 2 - 1).latents).sample.clamp(-1, 1) + 1) / 2


def told(pictures: torch.Tensor, prompts: list[str]) -> str:
    return ", ".join(
        f"{key} {value.mean():.3f}" for key, value in SpatialReward()(pictures, prompts).components.items()
    )


def main() -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts, rng = pair_prompts(), np.random.default_rng(0)
    true = torch.from_numpy(np.stack([draw_pair(pair, rng) for pair in all_pairs()])).permute(0, 3, 1, 2).float() / 255
    print(f"true pictures: {told(true, prompts)}")
    print(f"the same, relation reversed in the prompt: {told(true, [pair.reversed.prompt for pair in all_pairs()])}")
    print(f"after encoding and decoding: {told(decoded(pipe.vae, true), prompts)}")
    pictures = drawn(pipe, prompts, seed=1)
    print(f"drawn by the flow: {told(pictures, prompts)}")
    parts = SpatialReward()(pictures, prompts).components
    both = (parts["first"] * parts["second"]).bool()
    related = int(parts["relation"][both].sum())
    print(f"both things right in {both.sum()} of {len(both)}, and their relation in {related} of these")
    sheet = image_grid(drawn(pipe, [prompt for prompt in SHOWN for _ in range(10)], seed=0), columns=10)
    sheet.quantize(64).save(ROOT / "docs" / "images" / "mini-spatial-grid.png", optimize=True)


if __name__ == "__main__":
    main()
