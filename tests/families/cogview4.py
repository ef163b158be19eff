"""CogView4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import CogView4Pipeline, CogView4Transformer2DModel
from transformers import GlmConfig, GlmModel

from families import parts
from families.case import Case
from flowrl.models.pipeline import PipelineOptions

TOKENS = 30
"""Padded to 32, of which the prompts take 16."""


def build(folder: Path, **scheduler: Any) -> Path:
    torch.manual_seed(7)
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=parts.DIM,
        time_embed_dim=16,
        condition_dim=8,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    return parts.save(
        CogView4Pipeline,
        folder,
        transformer,
        scheduler=parts.euler(**scheduler),
        vae=parts.autoencoder(shift_factor=None),
        text_encoder=GlmModel(GlmConfig(**parts.text_config())),
        tokenizer=parts.tokenizer(side="left"),
    )


def call(*given: Any, **kwargs: Any) -> torch.Tensor:
    return parts.call(*given, max_sequence_length=TOKENS, **kwargs)


def images(*given: Any) -> torch.Tensor:
    return call(*given, output_type="pt")


DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75}
OPTIONS = PipelineOptions(sequence_length=TOKENS)
CASES = [
    Case(
        "cogview4",
        lambda folder: build(folder, time_shift_type="linear", **DYNAMIC),
        call,
        sizes=(16, (16, 32)),
        options=OPTIONS,
        images=images,
    ),
]
