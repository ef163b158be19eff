"""Mochi 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import small_pipelines as small
import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

from families.case import PROMPTS, Case
from flowrl.models.pipeline import PipelineFlow, PipelineOptions


def autoencoder() -> AutoencoderKLMochi:
    return AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )


def mochi(folder: Path) -> Path:
    torch.manual_seed(7)
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=small.T5_DIM,
        time_embed_dim=16,
        max_sequence_length=12,
    )
    pipeline = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=autoencoder(),
        text_encoder=small.t5_encoder(small.T5_DIM),
        tokenizer=small.t5_tokenizer(),
        transformer=small.louder(transformer),
    )
    pipeline.save_pretrained(folder)
    return folder


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, output_type: str = "latent") -> torch.Tensor:
    frames, _, height, width = flow.sample_shape
    return flow.pipeline(
        PROMPTS,
        latents=x_0,
        guidance_scale=scale,
        num_inference_steps=steps,
        height=height,
        width=width,
        num_frames=frames,
        max_sequence_length=flow.max_sequence_length,
        output_type=output_type,
    ).frames


def videos(*given: Any) -> torch.Tensor:
    return call(*given, output_type="pt")


OPTIONS = PipelineOptions(frames=7, sequence_length=12)
CASES = [Case("mochi", mochi, call, sizes=(16, (32, 16)), options=OPTIONS, images=videos, why_unpredictable="nonzero")]
