"""LTX-Video."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import small_pipelines as small
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from families.case import PROMPTS, Case
from flowrl.models.pipeline import PipelineFlow, PipelineOptions
from flowrl.models.video import as_tokens


def autoencoder(timed: bool) -> AutoencoderKLLTXVideo:
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        timestep_conditioning=timed,
        patch_size=2,
    )
    vae.latents_mean.copy_(torch.linspace(-0.3, 0.4, 8))
    vae.latents_std.copy_(torch.linspace(0.7, 1.4, 8))
    return vae


def ltx(folder: Path, timed: bool = False, kind: Any = LTXPipeline) -> Path:
    torch.manual_seed(5)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=small.T5_DIM,
    )
    pipeline = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
        vae=autoencoder(timed),
        text_encoder=small.t5_encoder(small.T5_DIM),
        tokenizer=small.t5_tokenizer(),
        transformer=small.louder(transformer),
    )
    pipeline.save_pretrained(folder)
    return folder


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, output_type: str = "latent") -> torch.Tensor:
    frames, _, height, width = flow.sample_shape
    result = flow.pipeline(
        PROMPTS,
        latents=as_tokens(x_0),
        guidance_scale=scale,
        num_inference_steps=steps,
        height=height,
        width=width,
        num_frames=frames,
        max_sequence_length=flow.max_sequence_length,
        output_type=output_type,
    ).frames
    return result.transpose(1, 2).reshape(x_0.shape) if output_type == "latent" else result


def videos(*given: Any) -> torch.Tensor:
    return call(*given, output_type="pt")


LTX = Case("ltx", ltx, call, sizes=(32, (32, 64)), options=PipelineOptions(frames=5, sequence_length=12), images=videos)
CASES = [LTX, replace(LTX, name="ltx-timed", build=lambda folder: ltx(folder, timed=True))]
