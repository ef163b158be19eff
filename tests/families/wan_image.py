"""Wan that begins with a picture: 2.1, whose network is given what an image encoder sees, 2.2 with two networks, and
2.2 with the picture in the place of the first latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import small_pipelines as small
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from diffusers.pipelines.wan import pipeline_wan_i2v
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from families import wan
from families.case import PROMPTS, Case
from families.flux_kontext import context, shown
from flowrl.models.pipeline import PipelineFlow

WIDTH = 16
if not hasattr(pipeline_wan_i2v, "ftfy"):  # where it is not installed: prompts here need no cleaning
    pipeline_wan_i2v.ftfy = SimpleNamespace(fix_text=str)  # type: ignore[attr-defined]


SEEING = {"in_channels": 12, "image_dim": WIDTH, "added_kv_proj_dim": 24}


def image_encoder(kind: Any = CLIPVisionModel) -> tuple[torch.nn.Module, CLIPImageProcessor]:
    """What sees pictures, and what makes its input of them."""
    size = {"height": 28, "width": 28}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": size["height"], "patch_size": 14}
    encoder = kind(CLIPVisionConfig(hidden_size=WIDTH, intermediate_size=32, projection_dim=8, **sizes))
    return encoder, CLIPImageProcessor(size=size, crop_size=size)


def build(folder: Path, two: bool = False) -> Path:
    torch.manual_seed(4)
    encoder, processor = image_encoder()
    seeing = {"in_channels": 12} if two else SEEING
    WanImageToVideoPipeline(
        tokenizer=small.t5_tokenizer(),
        text_encoder=wan.text_encoder(),
        image_encoder=None if two else encoder,
        image_processor=None if two else processor,
        vae=wan.autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=wan.transformer(**seeing),
        transformer_2=wan.transformer(**seeing) if two else None,
        boundary_ratio=0.65 if two else None,
    ).save_pretrained(folder)
    return folder


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, output_type: str = "latent") -> torch.Tensor:
    """Prompt by prompt: the pipeline takes one picture."""
    frames, _, height, width = flow.sample_shape
    options = {"guidance_scale": scale, "num_inference_steps": steps, "height": height, "width": width}

    def drawn(prompt: str, x: torch.Tensor) -> torch.Tensor:
        picture = shown(prompt, height, width)
        return flow.pipeline(
            picture,
            prompt,
            latents=x[None],
            num_frames=frames,
            max_sequence_length=flow.max_sequence_length,
            output_type=output_type,
            **options,
        ).frames

    return torch.cat([drawn(prompt, x) for prompt, x in zip(PROMPTS, x_0)])


def videos(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int) -> torch.Tensor:
    return call(flow, x_0, scale, steps, "pt")


ONE = Case(
    "wan-image-2.1",
    build,
    call,
    sizes=(16, (32, 16)),
    options=wan.OPTIONS,
    images=videos,
    context=context,
    same_network=True,
)


def build_first_frame(folder: Path) -> Path:
    more = {"image_encoder": None, "image_processor": None}
    return wan.wan(folder, cls=WanImageToVideoPipeline, expand_timesteps=True, **more)


CASES = [
    ONE,
    replace(
        ONE,
        name="wan-image-2.2",
        build=lambda folder: build(folder, two=True),
        images=None,
        load_adapter=wan.load_both,
    ),
    replace(ONE, name="wan-image-2.2-tokens", build=build_first_frame),
]
