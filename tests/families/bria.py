"""Bria 3.2, whose schedule depends on the resolution or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import small_pipelines
import torch
from diffusers import BriaPipeline, BriaTransformer2DModel

from families import parts
from families.case import Case
from flowrl.models.packing import pack, unpack
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

TOKENS = 16


def build(folder: Path, **scheduler: Any) -> Path:
    torch.manual_seed(10)
    transformer = BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=parts.DIM,
        axes_dims_rope=[4, 6, 6],
    )
    return parts.save(
        BriaPipeline,
        folder,
        transformer,
        scheduler=parts.euler(**scheduler),
        vae=parts.autoencoder(),
        text_encoder=small_pipelines.t5_encoder(parts.DIM),
        tokenizer=small_pipelines.t5_tokenizer(),
    )


def call(flow: PipelineFlow, x_0: torch.Tensor, *given: Any, **kwargs: Any) -> torch.Tensor:
    drawn = parts.call(flow, pack(x_0), *given, max_sequence_length=TOKENS, **kwargs)
    return drawn if kwargs else unpack(drawn, flow.latent_shape[1] // 2, flow.latent_shape[2] // 2)


def images(*given: Any) -> torch.Tensor:
    return call(*given, output_type="pt")


OPTIONS = PipelineOptions(sequence_length=TOKENS)
CASES = [
    Case("bria", build, call, sizes=(16, (16, 24)), scale=5.0, options=OPTIONS, images=images, has_lora=False),
    Case(
        "bria-dynamic",
        lambda folder: build(folder, use_dynamic_shifting=True),
        call,
        sizes=(16, (16, 24)),
        scale=5.0,
        options=OPTIONS,
        has_lora=False,
    ),
]
