"""Distils classifier-free guidance into mini-sd3's transformer: python pretrain/mini_sd3/distil.py

Without guidance the finished model then draws what it drew with it, at half the cost (Meng et al. 2023, arXiv
2210.03142, stage one, for a single scale). Needs what transformer.py leaves.
"""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from autoencoder import WORK
from diffusers import StableDiffusion3Pipeline
from pipeline import RepeatedTokenAttention, save_pipeline
from torch import nn
from transformer import PIPELINE, Captions, average_gradients, caption
from transformer import Config as TransformerConfig

from flowrl.envs.shapes import Scene


@dataclass
class Config:
    guidance_scale: float = 1.5
    steps: int = 400
    batch_size: int = 128
    lr: float = 3e-4
    """After 20 steps of warm-up; falls linearly to zero."""
    ema_decay: float = 0.98
    seed: int = 0
    workers: int = 2
    latents: Path = WORK / "latents.pt"
    source: Path = PIPELINE
    """Pipeline folder of the teacher."""
    out: Path = PIPELINE


def train(rank: int, config: Config, rendezvous: str) -> None:
    """What each process does: its share of every batch; the first one also saves and reports."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=config.workers)
    stored = torch.load(config.latents, weights_only=True)
    latents, scenes = stored["latents"], [Scene(*fields) for fields in stored["scenes"]]
    pipe = StableDiffusion3Pipeline.from_pretrained(config.source)
    captions, shift = Captions(pipe), pipe.scheduler.config.shift
    student, attention = pipe.transformer.train().requires_grad_(True), RepeatedTokenAttention()
    teacher, average = (copy.deepcopy(student).requires_grad_(False).eval() for _ in range(2))
    for transformer in (student, teacher):
        transformer.set_attn_processor(attention)
    weights = list(student.parameters())
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    rng = np.random.default_rng([config.seed, 2, rank])
    torch.manual_seed(hash((config.seed, 2, rank)))
    data_config, n = TransformerConfig(), config.batch_size // config.workers
    start, recent = time.monotonic(), 0.0
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min((step + 1) / 20, 1 - step / config.steps)
        chosen = rng.integers(len(scenes), size=n)
        prompts = [caption(scenes[i], rng, data_config, data_config.wrong_caption) for i in chosen]
        guided = torch.tensor([prompt != "" for prompt in prompts])  # the empty prompt stays what it is
        data, noise = latents[torch.from_numpy(chosen)].float(), torch.randn(n, *latents.shape[1:])
        uniform = torch.rand(n)
        sigma = shift * uniform / (1 + (shift - 1) * uniform)
        noised = torch.lerp(data, noise, sigma.view(-1, 1, 1, 1))
        attention.draw_repeats(n)
        context, pooled = captions(prompts)
        empty, empty_pooled = captions([""] * n)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                v = teacher(noised, context, pooled, 1000 * sigma, return_dict=False)[0].float()
                v_empty = teacher(noised, empty, empty_pooled, 1000 * sigma, return_dict=False)[0].float()
            predicted = student(noised, context, pooled, 1000 * sigma, return_dict=False)[0].float()
        scale = torch.where(guided, config.guidance_scale - 1, 0.0).view(-1, 1, 1, 1)
        loss = nn.functional.mse_loss(predicted, v + scale * (v - v_empty))
        optimizer.zero_grad()
        loss.backward()
        average_gradients(weights)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        decay = min(config.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), [weight.detach() for weight in weights], 1 - decay)
        recent += loss.item()
        if rank == 0 and (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {recent / 50:.5f} {time.monotonic() - start:.0f} s", flush=True)
            recent = 0.0
    if rank == 0:
        pipe.transformer = average
        save_pipeline(pipe, config.out)


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (config, f"file://{folder}/rendezvous"), nprocs=config.workers)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
