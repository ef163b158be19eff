"""Trains mini-sd3's two text encoders, as CLIP's are, before and apart from the transformer.

CLIP learns what a caption says from pictures; here the pooled embedding learns to name the caption's attributes.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from flowrl.envs.shapes import BACKGROUNDS, COLOURS, NUMBERS, SHAPES, Scene

ATTRIBUTES = ((None, *NUMBERS.values()), (None, *COLOURS), (None, *SHAPES), (None, *BACKGROUNDS))


def captions() -> tuple[list[str], Tensor]:
    """Every caption with any attributes left open, and the index (n, 4) of each attribute's value."""
    numbers = itertools.product(*(range(len(values)) for values in ATTRIBUTES))
    found, indices = [], []
    for index in numbers:
        count, colour, shape, background = (values[i] for values, i in zip(ATTRIBUTES, index))
        if colour is None or colour != background:
            found.append(Scene(count, colour, shape, background).prompt)
            indices.append(index)
    return found, torch.tensor(indices)


def train_text_encoders(pipe: StableDiffusion3Pipeline, steps: int = 300, batch_size: int = 256) -> float:
    """Trains both encoders to name attributes; returns the share of captions of which all are named right."""
    return train_to_name(pipe, *captions(), [len(values) for values in ATTRIBUTES], steps, batch_size)


def train_to_name(
    pipe: StableDiffusion3Pipeline, prompts: list[str], indices: Tensor, sizes: list[int], steps: int, batch_size: int
) -> float:
    """As ``train_text_encoders``, for any captions: ``indices`` (n, attributes), below each attribute's size."""
    tokens = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    accuracy = 1.0
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        heads = nn.ModuleList(nn.Linear(encoder.config.projection_dim, size) for size in sizes)
        optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=1e-3, weight_decay=0.01)
        for _ in range(steps):
            chosen = torch.randint(len(prompts), (batch_size,))
            pooled = encoder(tokens[chosen]).text_embeds
            noised = pooled + 0.5 * torch.randn_like(pooled)  # keeps the captions apart
            losses = [nn.functional.cross_entropy(head(noised), indices[chosen, i]) for i, head in enumerate(heads)]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
        with torch.no_grad():
            pooled = encoder(tokens).text_embeds
            named = torch.stack([head(pooled).argmax(dim=1) for head in heads], dim=1)
            accuracy = min(accuracy, float((named == indices).all(dim=1).float().mean()))
            encoder.text_projection.weight /= pooled.std(dim=0).mean()  # unit spread, as the transformer likes it
        encoder.eval().requires_grad_(False)
    return accuracy


def save_text_encoders(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    """Writes both encoders, and the tokenizer, whose numbering differs from one build to the next."""
    for name in ("text_encoder", "text_encoder_2", "tokenizer"):
        getattr(pipe, name).save_pretrained(folder / name)


def load_text_encoders(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    """Puts what ``save_text_encoders`` wrote into ``pipe``, frozen."""
    for name in ("text_encoder", "text_encoder_2"):
        encoder = CLIPTextModelWithProjection.from_pretrained(folder / name)
        setattr(pipe, name, encoder.eval().requires_grad_(False))
    pipe.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    pipe.tokenizer_2 = CLIPTokenizer.from_pretrained(folder / "tokenizer")
