"""FLUX.1 Kontext, a picture beside each prompt: guidance-distilled, and with classifier-free guidance beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import small_pipelines
import torch
from diffusers import FluxKontextPipeline
from PIL import Image

from families.case import PROMPTS, Case
from flowrl.envs.prompts import Prompt
from flowrl.models.packing import pack, unpack
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

PICTURES = Path(__file__).resolve().parent.parent / "data" / "pictures"
FILES = dict(zip(PROMPTS, ("stars.png", "circles.jpg", "squares.webp")))


def context(prompt: str) -> Prompt:
    return Prompt(prompt, {"image": str(PICTURES / FILES.get(prompt, "stars.png"))})


def shown(prompt: str, height: int, width: int) -> Image.Image:
    """The picture of a prompt in this size."""
    return Image.open(PICTURES / FILES[prompt]).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def build(folder: Path) -> Path:
    return small_pipelines.flux(folder, cls=FluxKontextPipeline)


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, **kwargs: Any) -> torch.Tensor:
    """The pipeline's own call, with pictures of the samples' size."""
    _, height, width = flow.sample_shape
    options = {"num_inference_steps": steps, "height": height, "width": width, "max_area": height * width}
    options |= {"_auto_resize": False, "output_type": "latent", **kwargs}
    pictures = [Image.open(PICTURES / FILES[prompt]).convert("RGB") for prompt in PROMPTS]
    pictures = [picture.resize((width, height), Image.Resampling.LANCZOS) for picture in pictures]
    if flow.distilled_guidance:
        options["guidance_scale"] = scale
    else:
        options |= {"true_cfg_scale": scale, "negative_prompt": [""] * len(PROMPTS)} if scale != 1 else {}
        options["guidance_scale"] = flow.embedded_guidance
    result = flow.pipeline(image=pictures, prompt=PROMPTS, latents=pack(x_0), **options).images
    return result if kwargs else unpack(result, flow.latent_shape[1] // 2, flow.latent_shape[2] // 2)


def images(*given: Any) -> torch.Tensor:
    return call(*given, output_type="pt")


CASES = [
    Case("flux-kontext", build, call, sizes=(16, (16, 24)), images=images, context=context),
    Case("flux-kontext-true-cfg", build, call, options=PipelineOptions(embedded_guidance=3.5), context=context),
]
