"""FLUX.2, guidance-distilled, and FLUX.2 Klein, with classifier-free guidance and distilled to do without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from small_pipelines import louder
from transformers import Qwen3ForCausalLM

from families import encoders
from families.case import PROMPTS, Case
from flowrl.models.packing import pack
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

LENGTH = 64  # the system's message takes its part of it


def parts(guidance_embeds: bool) -> dict[str, Any]:
    torch.manual_seed(6)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * encoders.WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"transformer": louder(transformer), "scheduler": scheduler, "vae": vae}


def build(folder: Path) -> None:
    pipeline = Flux2Pipeline(
        **parts(guidance_embeds=True),
        text_encoder=encoders.mistral(31),
        tokenizer=encoders.tokenizer(encoders.LISTS),  # a processor would want torchvision
    )
    pipeline.save_pretrained(folder)


def build_klein(folder: Path, is_distilled: bool = False) -> None:
    pipeline = Flux2KleinPipeline(
        **parts(guidance_embeds=False),
        text_encoder=Qwen3ForCausalLM(encoders.qwen3_config(28)),
        tokenizer=encoders.tokenizer(),
        is_distilled=is_distilled,
    )
    pipeline.save_pretrained(folder)


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, **kwargs: Any) -> torch.Tensor:
    _, height, width = flow.sample_shape
    options = {"num_inference_steps": steps, "height": height, "width": width, "output_type": "latent", **kwargs}
    options |= {"guidance_scale": scale, "max_sequence_length": LENGTH}
    return flow.pipeline(prompt=PROMPTS, latents=x_0, **options).images


def latents(flow: PipelineFlow, x_0: torch.Tensor, *given: Any) -> torch.Tensor:
    return call(flow, x_0, *given).mT.unflatten(2, x_0.shape[2:])


def latents_of_klein(flow: PipelineFlow, x_0: torch.Tensor, *given: Any) -> torch.Tensor:
    """Its call gives the autoencoder's latents, apart and of their own mean and deviation."""
    norm = flow.pipeline.vae.bn
    patches = (pack(call(flow, x_0, *given)) - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    return patches.mT.unflatten(2, x_0.shape[2:])


CASES = [
    Case(
        name,
        builder,
        giver,
        sizes=(16, (16, 24)),
        options=PipelineOptions(sequence_length=LENGTH),
        images=lambda *given: call(*given, output_type="pt"),
    )
    for name, builder, giver in (("flux2", build, latents), ("flux2-klein", build_klein, latents_of_klein))
]
