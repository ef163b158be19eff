"""Lumina-Image 2.0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

from families import parts
from families.case import Case
from flowrl.models.pipeline import PipelineOptions

TOKENS = 48


def build(folder: Path) -> Path:
    torch.manual_seed(4)
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(64, 16, 16),
        cap_feat_dim=parts.DIM,
    )
    return parts.save(
        Lumina2Pipeline,
        folder,
        transformer,
        scheduler=parts.euler(use_dynamic_shifting=True),
        vae=parts.autoencoder(4),  # this pipeline takes 8 pixels a latent for granted
        text_encoder=parts.gemma2(),
        tokenizer=parts.tokenizer(),
    )


def call(*given: Any, **kwargs: Any) -> torch.Tensor:
    return parts.call(*given, max_sequence_length=TOKENS, **kwargs)


def images(*given: Any) -> torch.Tensor:
    return call(*given, output_type="pt")


CASES = [
    Case(
        "lumina2",
        build,
        call,
        sizes=(32, (32, 48)),
        scale=4.0,
        options=PipelineOptions(sequence_length=TOKENS),
        images=images,
        why_unpredictable="_local_scalar_dense",  # lengths of the prompts
    )
]
