"""Trains mini-sd3's autoencoder on drawn pictures: python pretrain/mini_sd3/autoencoder.py"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import AutoencoderTiny
from torch import Tensor

from flowrl.envs.shapes import Scene, draw

WORK = Path(__file__).parents[1] / "work" / "mini_sd3"  # git-ignored


@dataclass
class Config:
    steps: int = 2400
    batch_size: int = 16
    lr: float = 2e-3
    """Peak learning rate; 200 steps of warm-up, then a cosine to zero."""
    latent_noise: float = 0.1
    """Noise on latents, in units of their standard deviation: the decoder learns to bear errors."""
    ema_decay: float = 0.998
    seed: int = 0
    threads: int = 2
    out: Path = WORK / "autoencoder"


def build_autoencoder() -> AutoencoderTiny:
    """64x64 pictures in [-1, 1] to 16x8x8 latents and back: Stable Diffusion 3's own geometry."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(1, 2, 2, 3),
        num_decoder_blocks=(3, 2, 2, 1),
        latent_channels=16,
    )


def draw_batch(n: int, rng: np.random.Generator) -> Tensor:
    """Pictures (n, 3, 64, 64) of random scenes, freely placed, float32 in [-1, 1]."""
    pictures = np.stack([draw(Scene(), rng, free=True) for _ in range(n)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def unit_spread_penalty(latents: Tensor) -> Tensor:
    """Zero when every channel of ``latents`` (B, C, H, W) has mean 0 and standard deviation 1."""
    channels = latents.float().transpose(0, 1).flatten(1)  # (C, B·H·W)
    return channels.mean(1).square().mean() + channels.std(1).clamp_min(1e-3).log().square().mean()


@torch.no_grad()
def psnr(autoencoder: AutoencoderTiny, images: Tensor) -> float:
    """Mean over the batch of the peak signal-to-noise ratio in dB; ``images`` (B, 3, H, W) in [-1, 1]."""
    decoded = autoencoder.decode(autoencoder.encode(images).latents).sample.clamp(-1, 1)
    error = ((decoded - images) / 2).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def set_scaling(autoencoder: AutoencoderTiny, images: Tensor) -> None:
    """Writes the factors by which Stable Diffusion 3 pipelines normalise latents into the config."""
    latents = autoencoder.encode(images).latents
    autoencoder.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))


def learning_rate(step: int, config: Config, warmup: int = 200) -> float:
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))


def train(config: Config) -> AutoencoderTiny:
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    held_out = draw_batch(200, np.random.default_rng(10_000 + config.seed))
    model = build_autoencoder().to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    start = time.monotonic()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        images = draw_batch(config.batch_size, rng).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encode(images).latents
            noised = latents + config.latent_noise * latents.detach().std() * torch.randn_like(latents)
            decoded = model.decode(noised).sample
        error = decoded.float() - images
        loss = error.square().mean() + 0.5 * error.abs().mean() + 0.01 * unit_spread_penalty(latents)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(config.ema_decay, (step + 1) / (step + 10))
        for mean, weight in zip(average.parameters(), model.parameters()):
            mean.lerp_(weight.detach(), 1 - decay)
        if (step + 1) % 300 == 0 or step + 1 == config.steps:
            seconds = time.monotonic() - start
            print(
                f"step {step + 1} loss {loss:.4f} PSNR {psnr(average, held_out):.2f} dB {seconds:.0f} s",
                flush=True,
            )
            set_scaling(average, held_out)
            average.save_pretrained(config.out)
    return average


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    torch.set_num_threads(config.threads)
    train(config)
