"""LongCat-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImagePipeline, LongCatImageTransformer2DModel
from small_pipelines import louder

from families import encoders
from families.case import PROMPTS, Case
from families.parts import autoencoder
from flowrl.models.packing import pack, unpack
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

LENGTH = 24


def parts(channels: int = 4) -> dict[str, Any]:
    """All but what encodes prompts."""
    torch.manual_seed(9)
    transformer = LongCatImageTransformer2DModel(
        in_channels=4 * channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=encoders.WIDTH,
        axes_dims_rope=[4, 6, 6],
    )
    return {
        "transformer": louder(transformer),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": autoencoder(latent_channels=channels),
    }


def build(folder: Path) -> None:
    pipeline = LongCatImagePipeline(
        **parts(),
        text_encoder=encoders.qwen_vl(),
        tokenizer=encoders.tokenizer(),
        text_processor=encoders.processor(),
    )
    pipeline.save_pretrained(folder)


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, **kwargs: Any) -> torch.Tensor:
    _, height, width = flow.sample_shape
    flow.pipeline.tokenizer_max_length = LENGTH
    options = {"num_inference_steps": steps, "height": height, "width": width, "output_type": "latent", **kwargs}
    options |= {"guidance_scale": scale, "enable_prompt_rewrite": False, "negative_prompt": [""] * len(PROMPTS)}
    result = flow.pipeline(PROMPTS, latents=pack(x_0), **options).images
    return result if kwargs else unpack(result, flow.latent_shape[1] // 2, flow.latent_shape[2] // 2)


CASES = [
    Case(
        "longcat-image",
        build,
        call,
        sizes=(16, (16, 24)),
        options=PipelineOptions(sequence_length=LENGTH),
        images=lambda *given: call(*given, output_type="pt"),
        own_noise="of 16 channels, whatever the autoencoder has",
        has_lora=False,
    )
]
