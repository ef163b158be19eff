"""Qwen-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from small_pipelines import louder

from families import encoders
from families.case import PROMPTS, Case
from flowrl.models.packing import pack, unpack
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

LENGTH = 16


def autoencoder() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.7, 0.1, 0.4, -0.2],
        latents_std=[2.8, 1.4, 0.9, 1.1],
    )


def parts(**network: Any) -> dict[str, Any]:
    """All but what encodes prompts."""
    torch.manual_seed(4)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=encoders.WIDTH,
        axes_dims_rope=(4, 6, 6),
        **network,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return {"transformer": louder(transformer), "scheduler": scheduler, "vae": autoencoder()}


def build(folder: Path) -> None:
    pipeline = QwenImagePipeline(
        **parts(),
        text_encoder=encoders.qwen_vl(),
        tokenizer=encoders.tokenizer(),
    )
    pipeline.save_pretrained(folder)


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, **kwargs: Any) -> torch.Tensor:
    _, height, width = flow.sample_shape
    options = {"num_inference_steps": steps, "height": height, "width": width, "output_type": "latent", **kwargs}
    options |= {"true_cfg_scale": scale, "negative_prompt": [""] * len(PROMPTS)} if scale != 1 else {}
    result = flow.pipeline(PROMPTS, latents=pack(x_0), max_sequence_length=LENGTH, **options).images
    return result if kwargs else unpack(result, flow.latent_shape[1] // 2, flow.latent_shape[2] // 2)


CASES = [
    Case(
        "qwen-image",
        build,
        call,
        sizes=(8, (8, 12)),
        options=PipelineOptions(sequence_length=LENGTH),
        images=lambda *given: call(*given, output_type="pt"),
    )
]
