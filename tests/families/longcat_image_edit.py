"""LongCat-Image-Edit, with a text encoder that sees pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import LongCatImageEditPipeline
from PIL import Image

from families import encoders, longcat_image
from families.case import PROMPTS, Case
from families.flux_kontext import FILES, PICTURES, context
from families.qwen_image_edit import as_ours
from flowrl.models.packing import pack, unpack
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

CHANNELS, LENGTH = 16, 12
"""Channels of the latents, which the pipeline's own call does not read from the autoencoder; tokens of a prompt."""


def build(folder: Path) -> Path:
    processor = encoders.processor()
    LongCatImageEditPipeline(
        **longcat_image.parts(CHANNELS),
        text_encoder=encoders.qwen_vl(sees=True),
        tokenizer=processor.tokenizer,
        text_processor=processor,
    ).save_pretrained(folder)
    return folder


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, **kwargs: Any) -> torch.Tensor:
    """Prompt by prompt: the pipeline takes one."""
    flow.pipeline.tokenizer_max_length = LENGTH
    options = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "latent", **kwargs}

    def drawn(prompt: str, x: torch.Tensor) -> torch.Tensor:
        picture = Image.open(PICTURES / FILES[prompt]).convert("RGB")
        return flow.pipeline(picture, prompt, latents=pack(x[None]), **options).images

    with as_ours(flow):
        result = torch.cat([drawn(prompt, x) for prompt, x in zip(PROMPTS, x_0)])
    return result if kwargs else unpack(result, flow.latent_shape[1] // 2, flow.latent_shape[2] // 2)


CASES = [
    Case(
        "longcat-image-edit",
        build,
        call,
        sizes=(16, (16, 24)),
        options=PipelineOptions(sequence_length=LENGTH),
        images=lambda *given: call(*given, output_type="pt"),
        context=context,
        around=as_ours,
        has_lora=False,
        same_network=True,
    )
]
