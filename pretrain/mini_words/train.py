"""Trains mini-words from nothing: python pretrain/mini_words/train.py

The same parts as mini-sd3's, and made by the same code, only smaller: an autoencoder, two text encoders, a transformer.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
from torch import Tensor, nn

from flowrl.envs.rewards.ocr import OCRReward
from flowrl.envs.words import PAIRS, TEXTS, Sign, all_signs, draw_sign

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "mini_sd3"))

from autoencoder import psnr, set_scaling, unit_spread_penalty
from fit_transformer import encode_captions, fit_transformer
from pipeline import assemble, build_text_encoder, build_tokenizer, build_transformer
from pipeline import save_pipeline as save
from text_encoders import train_to_name

ROOT = Path(__file__).parents[2]
WORK = ROOT / "pretrain" / "work" / "mini_words"  # git-ignored
INKS = tuple(dict.fromkeys(ink for ink, _ in PAIRS))
PAPERS = tuple(dict.fromkeys(paper for _, paper in PAIRS))
VOCABULARY = (*(text.lower() for text in TEXTS), *dict.fromkeys([*INKS, *PAPERS]), "in", "on")


@dataclass
class Config:
    autoencoder_steps: int = 1000
    steps: int = 10_000
    batch_size: int = 64
    lr: float = 2e-3
    """After 200 steps of warm-up, until it falls to zero over the last 40 %."""
    pictures: int = 20_000
    """Drawn and encoded once."""
    width: int = 48
    layers: int = 4
    text_width: int = 32
    shift: float = 3.0
    """Shift of the times towards noise."""
    blank: float = 0.4
    """Share of the pictures whose text is missing though the caption names it, on purpose: what rewards can mend. It is
    one choice for the whole picture; wrong words would be many, and letters of several get mixed."""
    drop_caption: float = 0.1
    """Share of empty captions, for classifier-free guidance."""
    leave_out: float = 0.2
    """Share of the colours that captions leave out."""
    ema_decay: float = 0.998
    seed: int = 0
    threads: int = 2
    out: Path = ROOT / "flowrl" / "assets" / "mini-words"


def pictures(signs: list[Sign], rng: np.random.Generator) -> Tensor:
    """(n, 3, 64, 64) float32 in [-1, 1]."""
    drawn = np.stack([draw_sign(sign, rng) for sign in signs])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def random_signs(n: int, rng: np.random.Generator) -> list[Sign]:
    signs = all_signs()
    return [signs[i] for i in rng.integers(len(signs), size=n)]


def train_autoencoder(config: Config, ocr: OCRReward) -> AutoencoderTiny:
    """64x64 pictures in [-1, 1] to 4x16x16 latents and back, that bear noise of 0.1 of their spread."""
    widths = (16, 16, 16)
    model = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=4,
    ).to(memory_format=torch.channels_last)
    rng, start = np.random.default_rng([config.seed, 1]), time.monotonic()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    for step in range(config.autoencoder_steps):
        for group in optimizer.param_groups:
            fall = 0.5 * (1 + math.cos(math.pi * step / config.autoencoder_steps))
            group["lr"] = 3e-3 * min((step + 1) / 100, fall)
        images = pictures(random_signs(16, rng), rng).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encode(images).latents
            decoded = model.decode(latents + 0.1 * latents.detach().std() * torch.randn_like(latents)).sample
        error = decoded.float() - images
        loss = error.square().mean() + 0.5 * error.abs().mean() + 0.01 * unit_spread_penalty(latents)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.995, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
    signs = random_signs(256, rng)
    held_out = pictures(signs, rng)
    set_scaling(average, held_out)
    with torch.no_grad():
        decoded = average.decode(average.encode(held_out).latents).sample.clamp(-1, 1)
    read = [float(ocr((x + 1) / 2, [s.prompt for s in signs]).components["exact"].mean()) for x in (held_out, decoded)]
    print(
        f"autoencoder: PSNR {psnr(average, held_out):.1f} dB; words read right: {read[0]:.3f} of true pictures, "
        f"{read[1]:.3f} of decoded ones; {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return average


def captions() -> tuple[list[str], Tensor]:
    """Every caption with any colour left open, and the index (n, 3) of each attribute's value."""
    found, indices = [], []
    for (i, text), ink, paper in itertools.product(enumerate(TEXTS), (None, *INKS), (None, *PAPERS)):
        if ink is None or paper is None or (ink, paper) in PAIRS:
            found.append(Sign(text, ink, paper).prompt)
            indices.append((i, (None, *INKS).index(ink), (None, *PAPERS).index(paper)))
    return found, torch.tensor(indices)


def caption(sign: Sign, rng: np.random.Generator, config: Config) -> str:
    """A caption: perhaps empty, colours left out at random."""
    if rng.random() < config.drop_caption:
        return ""
    return replace(sign, **{name: None for name in ("ink", "paper") if rng.random() < config.leave_out}).prompt


@torch.no_grad()
def encode(pipe: StableDiffusion3Pipeline, signs: list[Sign], rng: np.random.Generator) -> Tensor:
    """Normalised latents (n, 4, 16, 16) of a picture of each sign."""
    chunks = []
    for start in range(0, len(signs), 100):
        latents = pipe.vae.encode(pictures(signs[start : start + 100], rng)).latents
        chunks.append((latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor)
    return torch.cat(chunks)


def train_transformer(pipe: StableDiffusion3Pipeline, config: Config, ocr: OCRReward) -> None:
    """Trains ``pipe.transformer`` and writes the pipeline, now and then."""
    rng, start = np.random.default_rng([config.seed, 2]), time.monotonic()
    signs = random_signs(config.pictures, rng)
    latents = encode(pipe, signs, rng)
    blank = encode(pipe, [Sign("", INKS[0], paper) for paper in PAPERS], rng)
    papers = torch.tensor([PAPERS.index(sign.paper) for sign in signs if sign.paper])
    prompts = ["", *captions()[0]]
    rows = {prompt: row for row, prompt in enumerate(prompts)}

    def draw_batch() -> tuple[Tensor, Tensor]:
        chosen = rng.integers(len(signs), size=config.batch_size)
        asked = torch.tensor([rows[caption(signs[i], rng, config)] for i in chosen])
        missing = torch.from_numpy(rng.random(config.batch_size) < config.blank)[:, None, None, None]
        index = torch.from_numpy(chosen)
        return torch.where(missing, blank[papers[index]], latents[index]), asked

    def report(done: int, loss: float) -> None:
        save(pipe, config.out, Path(__file__).with_name("MODEL_CARD.md"))
        print(f"step {done} loss {loss:.4f} {measured(pipe, ocr)}, {time.monotonic() - start:.0f} s", flush=True)

    fit_transformer(pipe, config, encode_captions(pipe, prompts), draw_batch, report)


def measured(pipe: StableDiffusion3Pipeline, ocr: OCRReward) -> str:
    """How often the asked word, or any of the sixteen, can be read in 128 pictures of full prompts."""
    asked = [sign.prompt for sign in all_signs()]
    generator = torch.Generator().manual_seed(0)
    images = pipe(
        asked, num_inference_steps=20, guidance_scale=1.0, max_sequence_length=1, generator=generator, output_type="pt"
    ).images.float()
    exact = ocr(images, asked).components["exact"].mean()
    legible = torch.stack([ocr(images, [f'"{text}"'] * len(asked)).components["exact"] for text in TEXTS]).amax(0)
    return f"asked word {exact:.3f}, any word {legible.mean():.3f}"


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    ocr = OCRReward()
    autoencoder = train_autoencoder(config, ocr)
    tokenizer = build_tokenizer(VOCABULARY, symbols='"', length=10)
    encoders = tuple(build_text_encoder(tokenizer, config.text_width, heads=2) for _ in range(2))
    transformer = build_transformer(config.width, config.layers, 2, 16, 4, config.text_width)
    pipe = assemble(autoencoder, transformer.requires_grad_(False), tokenizer, encoders, config.shift)
    pipe.set_progress_bar_config(disable=True)
    sizes = [len(TEXTS), 1 + len(INKS), 1 + len(PAPERS)]
    named = train_to_name(pipe, *captions(), sizes, steps=600, batch_size=256)
    print(f"text encoders name {named:.1%} of the captions", flush=True)
    pipe.transformer = pipe.transformer.eval()
    train_transformer(pipe, config, ocr)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
