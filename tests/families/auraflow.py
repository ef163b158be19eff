"""AuraFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
from transformers import UMT5Config, UMT5EncoderModel

from families import parts
from families.case import Case
from flowrl.models.pipeline import PipelineOptions

TOKENS = 16


def build(folder: Path) -> Path:
    torch.manual_seed(6)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=parts.DIM,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    encoder = UMT5Config(
        vocab_size=len(parts.VOCABULARY), d_model=parts.DIM, d_ff=48, d_kv=16, num_layers=2, num_heads=2
    )
    return parts.save(
        AuraFlowPipeline,
        folder,
        transformer,
        scheduler=parts.euler(shift=1.73),
        vae=parts.autoencoder(shift_factor=None),
        text_encoder=UMT5EncoderModel(encoder),
        tokenizer=parts.tokenizer(begin=False, end=True),
    )


def call(*given: Any, **kwargs: Any) -> torch.Tensor:
    return parts.call(*given, max_sequence_length=TOKENS, **kwargs)


def images(*given: Any) -> torch.Tensor:
    return call(*given, output_type="pt")


CASES = [
    Case(
        "auraflow",
        build,
        call,
        sizes=(16, (16, 24)),
        scale=3.5,
        options=PipelineOptions(sequence_length=TOKENS),
        images=images,
    )
]
