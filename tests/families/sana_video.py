"""Sana of videos, with the autoencoder of Wan, and with that of LTX-2."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLLTX2Video, SanaVideoPipeline, SanaVideoTransformer3DModel

from families import parts, wan
from families.case import PROMPTS, Case
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

TOKENS = 16


def ltx2() -> AutoencoderKLLTX2Video:
    """8 pixels and 4 frames a latent, with a mean and deviation that are weights."""
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("spatiotemporal",) * 2,
        upsample_type=("spatiotemporal",) * 2,
        upsample_residual=(False,) * 2,
        upsample_factor=(1, 1),
        patch_size=2,
        scaling_factor=0.5,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )
    vae.latents_mean.copy_(torch.linspace(-0.3, 0.4, 4))
    vae.latents_std.copy_(torch.linspace(0.7, 1.4, 4))
    return vae


def build(folder: Path, of_ltx2: bool = False, kind: Any = SanaVideoPipeline) -> Path:
    torch.manual_seed(18)
    transformer = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=parts.DIM,
        rope_max_seq_len=32,
    )
    return parts.save(
        kind,
        folder,
        transformer,
        scheduler=parts.euler(),
        vae=ltx2() if of_ltx2 else wan.autoencoder(),
        text_encoder=parts.gemma2(),
        tokenizer=parts.tokenizer(),
    )


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, output_type: str = "latent") -> torch.Tensor:
    frames, _, height, width = flow.sample_shape
    return flow.pipeline(
        PROMPTS,
        latents=x_0,
        guidance_scale=scale,
        num_inference_steps=steps,
        height=height,
        width=width,
        frames=frames,
        max_sequence_length=TOKENS,
        use_resolution_binning=False,
        output_type=output_type,
    ).frames


CASES = [
    Case(
        "sana-video",
        build,
        call,
        sizes=(32, (64, 32)),
        options=PipelineOptions(frames=5, sequence_length=TOKENS),
        images=partial(call, output_type="pt"),
    )
]
