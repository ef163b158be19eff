"""Sana that begins a video with a picture."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import SanaImageToVideoPipeline

from families import sana_video
from families.case import PROMPTS
from families.flux_kontext import context, shown
from flowrl.models.pipeline import PipelineFlow


def build(folder: Path, of_ltx2: bool = False) -> Path:
    return sana_video.build(folder, of_ltx2, SanaImageToVideoPipeline)


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, output_type: str = "latent") -> torch.Tensor:
    """Prompt by prompt: the pipeline takes one picture. It writes into given latents."""
    frames, _, height, width = flow.sample_shape
    options = {"num_inference_steps": steps, "height": height, "width": width, "frames": frames}
    options |= {"max_sequence_length": sana_video.TOKENS, "use_resolution_binning": False, "output_type": output_type}
    given = zip(PROMPTS, x_0.clone())
    drawn = [
        flow.pipeline(shown(p, height, width), p, latents=x[None], guidance_scale=scale, **options).frames
        for p, x in given
    ]
    return torch.cat(drawn)


CASES = [
    replace(
        sana_video.CASES[0],
        name="sana-video-image",
        build=build,
        call=call,
        images=partial(call, output_type="pt"),
        context=context,
        same_network=True,
    )
]
