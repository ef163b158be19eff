"""Kandinsky 5.0 that begins a video with a picture; as published, with room for a mask beside the latents."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from diffusers import Kandinsky5I2VPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.kandinsky5 import pipeline_kandinsky_i2v

from families import kandinsky5_video
from families.case import PROMPTS
from families.flux_kontext import context, shown
from flowrl.models.pipeline import PipelineFlow, PipelineOptions


def build(folder: Path, room: bool = True) -> Path:
    return kandinsky5_video.build(folder, Kandinsky5I2VPipeline, visual_cond=room)


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, output: str = "latent") -> torch.Tensor:
    """Prompt by prompt, of the mode of the picture's posterior; latents as they are before the call levels them."""
    pipe, (frames, _, height, width) = flow.pipeline, flow.sample_shape
    options = {"num_inference_steps": steps, "height": height, "width": width, "num_frames": frames}
    options |= {"guidance_scale": scale, "max_sequence_length": kandinsky5_video.TOKENS, "negative_prompt": ""}

    def drawn(prompt: str, x: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(pipeline_kandinsky_i2v, "randn_tensor", return_value=x[None].clone()):
            return pipe(shown(prompt, height, width), prompt, output_type=output, **options).frames

    with mock.patch.object(DiagonalGaussianDistribution, "sample", lambda self, generator: self.mode()):
        if output == "pt":
            return torch.cat(list(map(drawn, PROMPTS, x_0.permute(0, 2, 3, 4, 1))))
        with mock.patch.object(pipe, "normalize_first_frame", torch.as_tensor):
            return torch.cat(list(map(drawn, PROMPTS, x_0.permute(0, 2, 3, 4, 1)))).permute(0, 4, 1, 2, 3)


CASES = [
    replace(
        kandinsky5_video.VIDEO,
        name="kandinsky5-video-image",
        build=build,
        call=call,
        sizes=(16, (16, 48)),
        # pictures are encoded one by one, as by its call: positions in bfloat16 make much of what rounding changes
        options=PipelineOptions(sequence_length=kandinsky5_video.TOKENS, frames=17, decode_batch=1),
        images=partial(call, output="pt"),
        context=context,
        same_network=True,
    )
]
