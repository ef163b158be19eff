"""Qwen-Image-Edit, in both of its classes, with a text encoder that sees pictures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline
from PIL import Image

from families import encoders, qwen_image
from families.case import PROMPTS, Case
from families.flux_kontext import FILES, PICTURES, context
from flowrl.models.packing import pack, unpack
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

LENGTH = 32


def build(folder: Path, kind: type[DiffusionPipeline] = QwenImageEditPipeline, **network: Any) -> Path:
    processor = encoders.processor()
    kind(
        **qwen_image.parts(**network),
        text_encoder=encoders.qwen_vl(sees=True),
        tokenizer=processor.tokenizer,
        processor=processor,
    ).save_pretrained(folder)
    return folder


@contextmanager
def as_ours(flow: PipelineFlow) -> Iterator[None]:
    """Let the pipeline's own call give its network pictures of the samples' size, and its text encoder their places.

    Those of the picture's tokens, which transformers 4 finds by itself: from version 5 on it is told by an argument
    that the call leaves out.
    """
    _, height, width = flow.sample_shape
    module, encoder = sys.modules[type(flow.pipeline).__module__], flow.pipeline.text_encoder
    sides = module.calculate_dimensions

    def sized(area: int, ratio: float) -> tuple[int, ...]:
        found = sides(area, width / height)
        return found if area < 1024 * 1024 else (width, height, *found[2:])

    def told(encoder: torch.nn.Module, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return given, {**named, "mm_token_type_ids": (named["input_ids"] == encoder.config.image_token_id).int()}

    module.calculate_dimensions, hook = sized, encoder.register_forward_pre_hook(told, with_kwargs=True)
    try:
        yield
    finally:
        module.calculate_dimensions = sides
        hook.remove()


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, **kwargs: Any) -> torch.Tensor:
    """Prompt by prompt: the later class takes one at a time."""
    _, height, width = flow.sample_shape
    options = {"num_inference_steps": steps, "height": height, "width": width, "output_type": "latent", **kwargs}
    options |= {"true_cfg_scale": scale, "negative_prompt": "" if scale != 1 else None}

    def drawn(prompt: str, x: torch.Tensor) -> torch.Tensor:
        picture = Image.open(PICTURES / FILES[prompt]).convert("RGB")
        return flow.pipeline(picture, prompt, latents=pack(x[None]), **options).images

    with as_ours(flow):
        result = torch.cat([drawn(prompt, x) for prompt, x in zip(PROMPTS, x_0)])
    return result if kwargs else unpack(result, flow.latent_shape[1] // 2, flow.latent_shape[2] // 2)


def case(name: str, kind: type[DiffusionPipeline], **network: Any) -> Case:
    return Case(
        name,
        partial(build, kind=kind, **network),
        call,
        sizes=(8, (8, 12)),
        options=PipelineOptions(sequence_length=LENGTH),
        images=lambda *given: call(*given, output_type="pt"),
        context=context,
        around=as_ours,
        same_network=True,
    )


CASES = [
    case("qwen-image-edit", QwenImageEditPipeline),
    case("qwen-image-edit-plus", QwenImageEditPlusPipeline, zero_cond_t=True),
]
