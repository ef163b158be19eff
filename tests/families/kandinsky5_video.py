"""Kandinsky 5.0, of videos; as published, with room for a first picture beside the latents, and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import Kandinsky5T2VPipeline
from torch.nn import functional as F

from families import encoders, parts
from families.case import PROMPTS, Case
from families.hunyuan_video import autoencoder
from families.kandinsky5_image import transformer
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

TOKENS = 24


def build(folder: Path, kind: Any = Kandinsky5T2VPipeline, **more: Any) -> Path:
    torch.manual_seed(9)
    return parts.save(
        kind,
        folder,
        transformer(encoders.WIDTH, **more),
        scheduler=parts.euler(shift=5.0),
        vae=autoencoder(),
        text_encoder=encoders.qwen_vl(),
        tokenizer=encoders.processor(),
        **parts.clip(),
    )


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, output: str = "latent") -> torch.Tensor:
    """Prompt by prompt: of several, the pipeline shows its network what pads them. It writes into given latents."""
    frames, _, height, width = flow.sample_shape
    options = {"num_inference_steps": steps, "height": height, "width": width, "num_frames": frames}
    options |= {"guidance_scale": scale, "max_sequence_length": TOKENS, "output_type": output, "negative_prompt": ""}
    latents = x_0.permute(0, 2, 3, 4, 1)
    if flow.network.config.visual_cond:  # type: ignore[union-attr]
        latents = F.pad(latents, (0, latents.shape[-1] + 1))
    drawn = [flow.pipeline(p, latents=x[None], **options).frames for p, x in zip(PROMPTS, latents.clone())]
    return torch.cat(drawn) if output == "pt" else torch.cat(drawn).permute(0, 4, 1, 2, 3)


def videos(*given: Any) -> torch.Tensor:
    return call(*given, "pt")


VIDEO = Case(
    "kandinsky5-video",
    lambda folder: build(folder, visual_cond=True),
    call,
    sizes=(32, (16, 48)),
    scale=3.5,
    options=PipelineOptions(sequence_length=TOKENS, frames=5),
    images=videos,
    why_unpredictable="_local_scalar_dense",  # lengths of the prompts
    drops_template=True,
    rounds=True,  # positions in bfloat16
)
CASES = [VIDEO, replace(VIDEO, name="kandinsky5-video-plain", build=build, images=None)]
