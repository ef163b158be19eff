"""Measures mini-sd3 and draws its grid of pictures: python pretrain/mini_sd3/evaluate.py"""

from __future__ import annotations

import io
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from autoencoder import WORK, draw_batch, psnr
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor

from flowrl.envs.rewards.count import count_components
from flowrl.envs.shapes import full_prompts, open_prompts

ROOT = Path(__file__).parents[2]
GRID_PROMPTS = (
    "three red stars on blue",
    "one yellow circle on black",
    "four white crosses on green",
    "two white triangles on red",
    "four squares on white",
    "green stars",
    "three shapes",
    "shapes",
)


@dataclass
class Config:
    folder: Path = ROOT / "flowrl" / "assets" / "mini-sd3"
    n: int = 1000
    """Prompts per measurement."""
    steps: tuple[int, ...] = (20,)
    guidance: tuple[float, ...] = (1.0,)
    max_sequence_length: int = 1
    """Zero tokens after the prompt; diffusers' own default is 256."""
    batch_size: int = 100
    seed: int = 0
    threads: int = 2
    grid: Path | None = ROOT / "docs" / "images" / "mini-sd3-grid.png"
    """Where to write a grid of pictures at the first of ``steps`` and ``guidance``."""
    out: Path = WORK / "evaluation.json"


def generate(pipe: StableDiffusion3Pipeline, prompts: list[str], steps: int, guidance: float, config: Config) -> Tensor:
    """Pictures (n, 3, 64, 64) in [0, 1]."""
    generator = torch.Generator().manual_seed(config.seed)
    batches = [
        pipe(
            prompts[start : start + config.batch_size],
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=config.max_sequence_length,
            generator=generator,
            output_type="pt",
        ).images
        for start in range(0, len(prompts), config.batch_size)
    ]
    return torch.cat(batches)


def colourfulness(images: Tensor) -> Tensor:
    """Hasler and Süsstrunk (2003), of images (B, 3, H, W) in [0, 1] scaled to 0..255; (B,)."""
    red, green, blue = (images * 255).flatten(2).unbind(dim=1)
    opponents = torch.stack([red - green, 0.5 * (red + green) - blue])  # (2, B, H·W)
    return opponents.std(dim=2, unbiased=False).norm(dim=0) + 0.3 * opponents.mean(dim=2).norm(dim=0)


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size in kB of each of the images (B, 3, H, W) in [0, 1] as JPEG of quality 95; (B,)."""
    sizes = []
    for pixels in (images * 255).round().byte().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes)


def summary(values: Tensor) -> dict[str, float]:
    return {"mean": round(float(values.mean()), 3), "std": round(float(values.std()), 3)}


def measure(pipe: StableDiffusion3Pipeline, steps: int, guidance: float, config: Config) -> dict[str, object]:
    """How well full prompts are followed, and the rewards of open ones."""
    rng = np.random.default_rng(config.seed)
    asked = [str(prompt) for prompt in rng.choice(full_prompts(), size=config.n)]
    start = time.monotonic()
    components = count_components(generate(pipe, asked, steps, guidance, config), asked)
    seconds = time.monotonic() - start
    result: dict[str, object] = {name: round(float(value.mean()), 4) for name, value in components.items()}
    result["count_and_shape"] = round(float((components["count"] * components["shape"]).mean()), 4)
    result["seconds_per_picture"] = round(seconds / config.n, 4)

    images = generate(pipe, [str(p) for p in rng.choice(open_prompts(), size=config.n)], steps, guidance, config)
    result["open_colourfulness"] = summary(colourfulness(images))
    result["open_jpeg_kilobytes"] = summary(jpeg_kilobytes(images))
    result["open_clean"] = round(float(count_components(images, ["shapes"] * config.n)["clean"].mean()), 4)
    return result


def draw_grid(pipe: StableDiffusion3Pipeline, path: Path, config: Config, columns: int = 10) -> None:
    """One row of pictures per prompt of ``GRID_PROMPTS``."""
    prompts = [prompt for prompt in GRID_PROMPTS for _ in range(columns)]
    images = generate(pipe, prompts, config.steps[0], config.guidance[0], config)
    framed = torch.nn.functional.pad(images, (2, 2, 2, 2), value=1.0).unflatten(0, (-1, columns))
    rows = framed.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (rows·H, columns·W, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((rows * 255).round().byte().numpy()).save(path, optimize=True)


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    pipe = StableDiffusion3Pipeline.from_pretrained(config.folder)
    pipe.set_progress_bar_config(disable=True)
    held_out = draw_batch(1000, np.random.default_rng(20_000 + config.seed))
    results: dict[str, object] = {"psnr": round(psnr(pipe.vae, held_out), 2)}
    for steps in config.steps:
        for guidance in config.guidance:
            results[f"steps {steps}, guidance {guidance}"] = measure(pipe, steps, guidance, config)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    if config.grid is not None:
        draw_grid(pipe, config.grid, config)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
