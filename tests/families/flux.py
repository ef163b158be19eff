"""FLUX.1, guidance-distilled and not, and with classifier-free guidance beside the distilled one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import small_pipelines
import torch

from families.case import PROMPTS, Case
from flowrl.models.packing import pack, unpack
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

TOKENS = 16
"""Of a prompt, but for one case, which takes as many as its pipeline does by itself."""


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, **kwargs: Any) -> torch.Tensor:
    _, height, width = flow.sample_shape
    options = {"num_inference_steps": steps, "height": height, "width": width, "output_type": "latent", **kwargs}
    if flow.max_sequence_length == TOKENS:
        options["max_sequence_length"] = TOKENS
    if flow.distilled_guidance:
        options["guidance_scale"] = scale
    else:
        options |= {"true_cfg_scale": scale, "negative_prompt": [""] * len(PROMPTS)} if scale != 1 else {}
        options["guidance_scale"] = flow.embedded_guidance
    result = flow.pipeline(PROMPTS, latents=pack(x_0), **options).images
    return result if kwargs else unpack(result, flow.latent_shape[1] // 2, flow.latent_shape[2] // 2)


def images(*given: Any) -> torch.Tensor:
    return call(*given, output_type="pt")


SHORT = PipelineOptions(sequence_length=TOKENS)
CASES = [
    Case("flux-dev", small_pipelines.flux, call, sizes=(16, (16, 24)), images=images, options=SHORT),
    Case("flux-schnell", lambda folder: small_pipelines.flux(folder, guidance_embeds=False), call, images=images),
    Case("flux-true-cfg", small_pipelines.flux, call, options=replace(SHORT, embedded_guidance=3.5)),
]
