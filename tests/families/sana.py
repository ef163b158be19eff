"""Sana."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel

from families import parts
from families.case import Case
from flowrl.models.pipeline import PipelineOptions

TOKENS = 16


def build(folder: Path) -> Path:
    torch.manual_seed(5)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=parts.DIM,
        sample_size=4,
        timestep_scale=0.5,
    )
    sides = {
        f"{side}_{setting}": value
        for side in ("encoder", "decoder")
        for setting, value in {
            "block_types": ("ResBlock",) * 4,
            "block_out_channels": (8,) * 4,
            "layers_per_block": (1,) * 4,
            "qkv_multiscales": ((),) * 4,
        }.items()
    }
    return parts.save(
        SanaPipeline,
        folder,
        transformer,
        scheduler=parts.euler(),
        vae=AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.41, **sides),
        text_encoder=parts.gemma2(),
        tokenizer=parts.tokenizer(),
    )


def call(*given: Any, **kwargs: Any) -> torch.Tensor:
    return parts.call(*given, max_sequence_length=TOKENS, use_resolution_binning=False, **kwargs)


def images(*given: Any) -> torch.Tensor:
    return call(*given, output_type="pt")


CASES = [
    Case("sana", build, call, sizes=(32, (32, 64)), options=PipelineOptions(sequence_length=TOKENS), images=images)
]
