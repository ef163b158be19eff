"""Qwen-Image 2.1, whose autoencoder has a channel of what is transparent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from transformers import Qwen3VLProcessor

from families import encoders, parts
from families.case import PROMPTS, Case
from flowrl.models.pipeline import PipelineFlow, PipelineOptions
from flowrl.models.video import as_tokens

CHANNELS, LENGTH = 8, 32


def build(folder: Path, colours: int = 4, causal: bool = True, levels: list[float] | None = None) -> Path:
    torch.manual_seed(16)
    vae = AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False] * 4,
        latents_mean=torch.linspace(-0.7, 0.4, CHANNELS).tolist(),
        latents_std=torch.linspace(2.8, 0.9, CHANNELS).tolist(),
        in_channels=colours,
        out_channels=colours,
    )
    transformer = QwenImage21Transformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=encoders.WIDTH,
        axes_dims_rope=(4, 6, 6),
        causal_condition=causal,
    )
    return parts.save(
        QwenImage21Pipeline,
        folder,
        transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02),
        vae=vae,
        text_encoder=encoders.qwen3_vl_generator(2),
        processor=encoders.processor(Qwen3VLProcessor, encoders.MIXED),
        sample_sigmas=levels,
    )


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, **more: Any) -> torch.Tensor:
    """Prompt by prompt: of several, what pads them moves the places of the image."""
    _, height, width = flow.sample_shape
    output = more.pop("output", "latent")
    options = {"num_inference_steps": steps, "height": height, "width": width, "output_type": output, **more}
    options |= {"true_cfg_scale": scale, "negative_prompt": ""} if scale != 1 else {}
    drawn = [flow.pipeline(p, latents=as_tokens(x[None]), **options).images for p, x in zip(PROMPTS, x_0)]
    return torch.cat(drawn) if output == "pt" else torch.cat(drawn).transpose(1, 2).reshape(x_0.shape)


def on_white(images: torch.Tensor) -> torch.Tensor:
    return images[:, :3] * images[:, 3:] + 1 - images[:, 3:]


CASES = [
    Case(
        "qwen-image-2.1",
        build,
        call,
        sizes=(32, (32, 64)),
        options=PipelineOptions(sequence_length=LENGTH),
        images=lambda *given: on_white(call(*given, output="pt")),
        shown=on_white,
        why_unpredictable="_local_scalar_dense",  # lengths of the prompts
    )
]
