"""Trains mini-spatial: python pretrain/mini_spatial/train.py

The autoencoder is mini-sd3's; text encoders and transformer are made by the same code, only smaller.
"""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
from torch import Tensor

from flowrl.envs.rewards.spatial import SpatialReward
from flowrl.envs.spatial import COLOURS, RELATIONS, SHAPES, WORDS, Pair, Thing, all_pairs, draw_pair, pair_prompts

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "mini_sd3"))

from fit_transformer import encode_captions, fit_transformer
from pipeline import assemble, build_text_encoder, build_tokenizer, build_transformer
from pipeline import save_pipeline as save
from text_encoders import train_to_name

ROOT = Path(__file__).parents[2]


@dataclass
class Config:
    steps: int = 5000
    """More give a better model, and leave less for rewards to mend."""
    batch_size: int = 64
    lr: float = 2e-3
    """After 200 steps of warm-up, until it falls to zero over the last 40 %."""
    pictures: int = 20_000
    """Drawn and encoded once."""
    width: int = 80
    layers: int = 5
    text_width: int = 48
    shift: float = 3.0
    """Shift of the times towards noise."""
    drop_caption: float = 0.1
    """Share of empty captions, for classifier-free guidance."""
    leave_out: float = 0.1
    """Share of the colours that captions leave out."""
    ema_decay: float = 0.998
    seed: int = 0
    threads: int = 1
    autoencoder: Path = ROOT / "flowrl" / "assets" / "mini-sd3" / "vae"
    out: Path = ROOT / "flowrl" / "assets" / "mini-spatial"


def captions() -> tuple[list[str], Tensor]:
    """Every caption with any colour left open, and the index (n, 5) of each attribute's value."""
    found, indices = [], []
    things = [Thing(colour, shape) for colour, shape in itertools.product((None, *COLOURS), SHAPES)]
    for first, relation, second in itertools.product(things, RELATIONS, things):
        if first.shape != second.shape and (first.colour != second.colour or first.colour is None):
            found.append(Pair(first, relation, second).prompt)
            of_things = [i for t in (first, second) for i in ((None, *COLOURS).index(t.colour), SHAPES.index(t.shape))]
            indices.append((*of_things, list(RELATIONS).index(relation)))
    return found, torch.tensor(indices)


def caption(pair: Pair, rng: np.random.Generator, config: Config) -> str:
    """A caption: perhaps empty, colours left out at random."""
    if rng.random() < config.drop_caption:
        return ""
    first, second = (
        replace(thing, colour=None) if rng.random() < config.leave_out else thing for thing in (pair.first, pair.second)
    )
    return replace(pair, first=first, second=second).prompt


@torch.no_grad()
def encode(pipe: StableDiffusion3Pipeline, pairs: list[Pair], rng: np.random.Generator) -> Tensor:
    """Normalised latents (n, 16, 8, 8) of a picture of each pair."""
    chunks = []
    for start in range(0, len(pairs), 100):
        drawn = np.stack([draw_pair(pair, rng) for pair in pairs[start : start + 100]])
        pictures = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        latents = pipe.vae.encode(pictures).latents
        chunks.append((latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor)
    return torch.cat(chunks)


def train_transformer(pipe: StableDiffusion3Pipeline, config: Config) -> None:
    """Trains ``pipe.transformer`` and writes the pipeline, now and then."""
    rng, start = np.random.default_rng([config.seed, 2]), time.monotonic()
    every = all_pairs()
    pairs = [every[i] for i in rng.integers(len(every), size=config.pictures)]
    latents = encode(pipe, pairs, rng)
    prompts = ["", *captions()[0]]
    rows = {prompt: row for row, prompt in enumerate(prompts)}

    def draw_batch() -> tuple[Tensor, Tensor]:
        chosen = rng.integers(len(pairs), size=config.batch_size)
        asked = torch.tensor([rows[caption(pairs[i], rng, config)] for i in chosen])
        return latents[torch.from_numpy(chosen)], asked

    def report(done: int, loss: float) -> None:
        save(pipe, config.out, Path(__file__).with_name("MODEL_CARD.md"))
        print(f"step {done} loss {loss:.4f} {measured(pipe)}, {time.monotonic() - start:.0f} s", flush=True)

    fit_transformer(pipe, config, encode_captions(pipe, prompts), draw_batch, report)


def measured(pipe: StableDiffusion3Pipeline, n: int = 192) -> str:
    """What is right of pictures of ``n`` full prompts."""
    asked = pair_prompts()[:: len(pair_prompts()) // n][:n]
    generator = torch.Generator().manual_seed(0)
    images = pipe(
        asked, num_inference_steps=20, guidance_scale=1.0, max_sequence_length=1, generator=generator, output_type="pt"
    ).images.float()
    return ", ".join(f"{key} {value.mean():.3f}" for key, value in SpatialReward()(images, asked).components.items())


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    autoencoder = AutoencoderTiny.from_pretrained(config.autoencoder, torch_dtype=torch.float32)
    tokenizer = build_tokenizer(WORDS, length=12)
    encoders = tuple(build_text_encoder(tokenizer, config.text_width, heads=2) for _ in range(2))
    transformer = build_transformer(config.width, config.layers, 2, text_width=config.text_width)
    pipe = assemble(autoencoder, transformer.requires_grad_(False), tokenizer, encoders, config.shift)
    pipe.set_progress_bar_config(disable=True)
    sizes = [1 + len(COLOURS), len(SHAPES), 1 + len(COLOURS), len(SHAPES), len(RELATIONS)]
    named = train_to_name(pipe, *captions(), sizes, steps=600, batch_size=256)
    print(f"text encoders name {named:.1%} of the captions", flush=True)
    pipe.transformer = pipe.transformer.eval()
    train_transformer(pipe, config)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
