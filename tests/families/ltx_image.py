"""LTX-Video that begins with a picture."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from diffusers import LTXImageToVideoPipeline

from families import ltx
from families.case import PROMPTS, Case
from families.flux_kontext import context, shown
from flowrl.models.pipeline import PipelineFlow
from flowrl.models.video import as_tokens


def build(folder: Path) -> Path:
    return ltx.ltx(folder, kind=LTXImageToVideoPipeline)


def begun(flow: PipelineFlow, x_0: torch.Tensor) -> torch.Tensor:
    """Noise that begins with the pictures' latents, which the pipeline's own call would draw from their posterior."""
    pipe, (_, _, height, width) = flow.pipeline, flow.sample_shape
    found = x_0.clone()
    for prompt, x in zip(PROMPTS, found):
        picture = shown(prompt, height, width)
        given = pipe.video_processor.preprocess(picture, height=height, width=width)[:, :, None]
        mode = pipe.vae.encode(given).latent_dist.mode()
        x[:, :1] = pipe._normalize_latents(mode, pipe.vae.latents_mean, pipe.vae.latents_std)[0]
    return found


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, output_type: str = "latent") -> torch.Tensor:
    frames, _, height, width = flow.sample_shape
    result = flow.pipeline(
        prompt=PROMPTS,
        latents=as_tokens(begun(flow, x_0)),
        guidance_scale=scale,
        num_inference_steps=steps,
        height=height,
        width=width,
        num_frames=frames,
        max_sequence_length=flow.max_sequence_length,
        output_type=output_type,
    ).frames
    return result.transpose(1, 2).reshape(x_0.shape) if output_type == "latent" else result


CASES = [
    Case(
        "ltx-image",
        build,
        call,
        sizes=ltx.LTX.sizes,
        options=ltx.LTX.options,
        images=partial(call, output_type="pt"),
        context=context,
    )
]
