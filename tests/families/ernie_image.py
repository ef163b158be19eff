"""ERNIE-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler
from small_pipelines import louder

from families import encoders
from families.case import PROMPTS, Case
from families.flux2 import autoencoder
from flowrl.models.pipeline import PipelineFlow, PipelineOptions


def build(folder: Path) -> None:
    torch.manual_seed(11)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=64,
        in_channels=16,
        out_channels=16,
        text_in_dim=encoders.WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    for layer in (transformer.adaLN_modulation[-1], transformer.final_linear):  # zeros at first
        layer.reset_parameters()
    pipeline = ErnieImagePipeline(
        transformer=louder(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=encoders.mistral(2).model,
        tokenizer=encoders.tokenizer(),
    )
    pipeline.save_pretrained(folder)


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, **kwargs: Any) -> torch.Tensor:
    _, height, width = flow.sample_shape
    options = {"num_inference_steps": steps, "height": height, "width": width, "output_type": "latent", **kwargs}
    return flow.pipeline(PROMPTS, latents=x_0, guidance_scale=scale, **options).images


CASES = [
    Case(
        "ernie-image",
        build,
        call,
        sizes=(16, (16, 24)),
        options=PipelineOptions(sequence_length=8),
        images=lambda *given: call(*given, output_type="pt"),
    )
]
