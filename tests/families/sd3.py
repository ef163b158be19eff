"""Stable Diffusion 3."""

from __future__ import annotations

from typing import Any

import small_pipelines
import torch

from families.case import PROMPTS, Case
from flowrl.models.pipeline import PipelineFlow


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, **kwargs: Any) -> torch.Tensor:
    _, height, width = flow.sample_shape
    options = {"num_inference_steps": steps, "height": height, "width": width, "output_type": "latent", **kwargs}
    return flow.pipeline(PROMPTS, latents=x_0, guidance_scale=scale, **options).images


CASES = [
    Case(
        "sd3",
        small_pipelines.sd3,
        call,
        sizes=(16, (16, 24)),
        images=lambda *given: call(*given, output_type="pt"),
    )
]
