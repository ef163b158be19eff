"""Chroma."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from small_pipelines import T5_DIM, autoencoder, louder, t5_encoder, t5_tokenizer

from families.case import PROMPTS, Case
from flowrl.models.packing import pack, unpack
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

LENGTH = 12


def build(folder: Path) -> None:
    torch.manual_seed(7)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_DIM,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    for blocks in (transformer.transformer_blocks, transformer.single_transformer_blocks):
        louder(blocks)  # not the embedding of times, which both ways round otherwise
    pipeline = ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=t5_encoder(T5_DIM),
        tokenizer=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, **kwargs: Any) -> torch.Tensor:
    _, height, width = flow.sample_shape
    options = {"num_inference_steps": steps, "height": height, "width": width, "output_type": "latent", **kwargs}
    options |= {"guidance_scale": scale, "max_sequence_length": LENGTH, "negative_prompt": [""] * len(PROMPTS)}
    result = flow.pipeline(PROMPTS, latents=pack(x_0), **options).images
    return result if kwargs else unpack(result, flow.latent_shape[1] // 2, flow.latent_shape[2] // 2)


CASES = [
    Case(
        "chroma",
        build,
        call,
        sizes=(16, (16, 24)),
        options=PipelineOptions(sequence_length=LENGTH),
        images=lambda *given: call(*given, output_type="pt"),
    )
]
