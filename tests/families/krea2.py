"""Krea 2, distilled and not."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from small_pipelines import louder

from families import encoders
from families.case import PROMPTS, Case
from families.qwen_image import autoencoder
from flowrl.models.packing import pack, unpack
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

LENGTH = 16


def build(folder: Path, is_distilled: bool = False) -> None:
    torch.manual_seed(10)
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=32,
        text_hidden_dim=encoders.WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    pipeline = Krea2Pipeline(
        transformer=louder(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=encoders.qwen3_vl(),
        tokenizer=encoders.tokenizer(),
        text_encoder_select_layers=(1, 2),
        is_distilled=is_distilled,
    )
    pipeline.save_pretrained(folder)


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, **kwargs: Any) -> torch.Tensor:
    _, height, width = flow.sample_shape
    options = {"num_inference_steps": steps, "height": height, "width": width, "output_type": "latent", **kwargs}
    options["guidance_scale"] = 0.0 if scale == 1 else scale  # 0 is its own for none
    result = flow.pipeline(PROMPTS, latents=pack(x_0), max_sequence_length=LENGTH, **options).images
    return result if kwargs else unpack(result, flow.latent_shape[1] // 2, flow.latent_shape[2] // 2)


OPTIONS = PipelineOptions(sequence_length=LENGTH)
CASES = [
    Case("krea2", build, call, (8, (8, 12)), options=OPTIONS, images=lambda *given: call(*given, output_type="pt")),
    Case("krea2-turbo", partial(build, is_distilled=True), call, (8, (8, 12)), options=OPTIONS),
]
