"""HunyuanVideo 1.5 that begins with a picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance, HunyuanVideo15ImageToVideoPipeline
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from families.case import PROMPTS, Case
from families.flux_kontext import context, shown
from families.hunyuan_video15 import hunyuan_video15
from flowrl.models.pipeline import PipelineFlow, PipelineOptions


def build(folder: Path) -> Path:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hunyuan_video15(
        folder,
        HunyuanVideo15ImageToVideoPipeline,
        layers=1,
        image_encoder=SiglipVisionModel(SiglipVisionConfig(image_size=16, patch_size=8, **sizes)),
        feature_extractor=SiglipImageProcessor(size={"height": 16, "width": 16}),
    )


@contextmanager
def as_ours(flow: PipelineFlow) -> Iterator[None]:
    """Let the pipeline's own call draw samples of this size."""
    processor, (_, _, height, width) = flow.pipeline.video_processor, flow.sample_shape
    found = processor.calculate_default_height_width
    processor.calculate_default_height_width = lambda **given: (height, width)
    try:
        yield
    finally:
        processor.calculate_default_height_width = found


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, output_type: str = "latent") -> torch.Tensor:
    """Prompt by prompt: the pipeline takes one picture."""
    pipe, (frames, _, height, width) = flow.pipeline, flow.sample_shape
    pipe.guider = ClassifierFreeGuidance(guidance_scale=scale)
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = flow.max_sequence_length, 12
    options: dict[str, Any] = {"num_inference_steps": steps, "num_frames": frames, "output_type": output_type}

    def drawn(prompt: str, x: torch.Tensor) -> torch.Tensor:
        picture = shown(prompt, height, width)
        return pipe(picture, [prompt], latents=x[None], **options).frames

    with as_ours(flow):
        return torch.cat([drawn(prompt, x) for prompt, x in zip(PROMPTS, x_0)])


CASES = [
    Case(
        "hunyuan-video-1.5-image",
        build,
        call,
        sizes=(32, (64, 32)),
        options=PipelineOptions(frames=5, sequence_length=12),
        images=partial(call, output_type="pt"),
        why_unpredictable="_local_scalar_dense",  # lengths of the prompts
        has_lora=False,
        same_network=True,
        most_bytes=20e6,  # a projection of 2048 x 2048 is fixed in the transformer's code
        context=context,
        around=as_ours,
    )
]
