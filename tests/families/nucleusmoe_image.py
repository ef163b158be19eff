"""Nucleus-Image, with one dense block and one of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, NucleusMoEImagePipeline, NucleusMoEImageTransformer2DModel
from small_pipelines import louder
from transformers import Qwen3VLProcessor

from families import encoders
from families.case import PROMPTS, Case
from families.qwen_image import autoencoder
from flowrl.models.packing import pack, unpack
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

LENGTH = 80  # the system's message takes most of it


def build(folder: Path) -> None:
    torch.manual_seed(12)
    transformer = NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=encoders.WIDTH,
        axes_dims_rope=(4, 6, 6),
        mlp_ratio=8.0,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )
    for name, parameter in transformer.named_parameters():
        if ".experts." in name:  # made without values
            torch.nn.init.normal_(parameter, std=0.1)
    pipeline = NucleusMoEImagePipeline(
        transformer=louder(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=encoders.qwen3_vl_generator(9),
        processor=encoders.processor(Qwen3VLProcessor, encoders.MIXED),
    )
    pipeline.save_pretrained(folder)


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, **kwargs: Any) -> torch.Tensor:
    _, height, width = flow.sample_shape
    options = {"num_inference_steps": steps, "height": height, "width": width, "output_type": "latent", **kwargs}
    options |= {"guidance_scale": scale, "max_sequence_length": LENGTH}
    result = flow.pipeline(PROMPTS, latents=pack(x_0), **options).images
    return result if kwargs else unpack(result, flow.latent_shape[1] // 2, flow.latent_shape[2] // 2)


CASES = [
    Case(
        "nucleusmoe-image",
        build,
        call,
        sizes=(8, (8, 12)),
        options=PipelineOptions(sequence_length=LENGTH),
        images=lambda *given: call(*given, output_type="pt"),
        why_unpredictable="_local_scalar_dense",  # which experts take a token
        has_lora=False,
    )
]
