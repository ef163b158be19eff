"""Kandinsky 5.0, of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import small_pipelines
import torch
from diffusers import Kandinsky5T2IPipeline, Kandinsky5Transformer3DModel

from families import parts
from families.case import PROMPTS, Case
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

TOKENS = 24


def transformer(text_dim: int = parts.DIM, **more: Any) -> Kandinsky5Transformer3DModel:
    made = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=text_dim,
        in_text_dim2=small_pipelines.POOLED,
        time_dim=16,
        model_dim=32,
        ff_dim=48,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
        **more,
    )
    for name, parameter in made.named_parameters():
        if "modulation.out_layer.weight" in name:  # zeros at first, so that nothing depends on prompts
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def build(folder: Path) -> Path:
    torch.manual_seed(9)
    return parts.save(
        Kandinsky5T2IPipeline,
        folder,
        transformer(),
        scheduler=parts.euler(),
        vae=parts.autoencoder(4),
        text_encoder=parts.qwen_vl(),
        tokenizer=parts.signs_tokenizer(),
        **parts.clip(),
    )


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, output: str = "latent") -> torch.Tensor:
    """Prompt by prompt: of several, the pipeline shows its network what pads them."""
    _, height, width = flow.sample_shape
    flow.pipeline.resolutions = [(width, height)]
    options = {"num_inference_steps": steps, "height": height, "width": width, "output_type": output}
    options |= {"guidance_scale": scale, "max_sequence_length": TOKENS}
    frames = x_0.permute(0, 2, 3, 1)[:, None]
    drawn = [flow.pipeline(p, latents=x[None], **options).image for p, x in zip(PROMPTS, frames)]
    return torch.cat(drawn) if output == "pt" else torch.cat(drawn)[:, 0].permute(0, 3, 1, 2)


def images(*given: Any) -> torch.Tensor:
    return call(*given, "pt")


CASES = [
    Case(
        "kandinsky5-image",
        build,
        call,
        sizes=(32, (32, 48)),
        scale=3.5,
        options=PipelineOptions(sequence_length=TOKENS),
        images=images,
        why_unpredictable="_local_scalar_dense",  # lengths of the prompts
        drops_template=True,
        own_noise="of the nearest of seven sizes",
        rounds=True,  # positions in bfloat16
    )
]
