"""Z-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from small_pipelines import autoencoder, louder
from transformers import Qwen3Model

from families import encoders
from families.case import PROMPTS, Case
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

LENGTH = 40  # the longer prompts take two of the blocks of 32 tokens that the network pads to, the shortest one


def build(folder: Path) -> None:
    torch.manual_seed(5)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=encoders.WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 16, 16],
    )
    louder(transformer.layers)  # not the embedding of times, which both ways round otherwise
    pipeline = ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=Qwen3Model(encoders.qwen3_config()),
        tokenizer=encoders.tokenizer(),
    )
    pipeline.save_pretrained(folder)


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, **kwargs: Any) -> torch.Tensor:
    _, height, width = flow.sample_shape
    options = {"num_inference_steps": steps, "height": height, "width": width, "output_type": "latent", **kwargs}
    options["guidance_scale"] = 0.0 if scale == 1 else scale  # 0 is its own for none
    prompts = list(PROMPTS)  # it writes into the list that it is given
    return flow.pipeline(prompts, latents=x_0, max_sequence_length=LENGTH, **options).images


CASES = [
    Case(
        "z-image",
        build,
        call,
        sizes=(16, (16, 24)),
        options=PipelineOptions(sequence_length=LENGTH),
        images=lambda *given: call(*given, output_type="pt"),
    )
]
