"""HunyuanImage 2.1, guidance-distilled and not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanImage,
    ClassifierFreeGuidance,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
)
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from families import parts
from families.case import PROMPTS, Case
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

TOKENS = 20


def build(folder: Path, guidance_embeds: bool = False) -> Path:
    torch.manual_seed(11)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        guidance_embeds=guidance_embeds,
        text_embed_dim=parts.DIM,
        text_embed_2_dim=16,
        rope_axes_dim=(8, 8),
    )
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=32,
        scaling_factor=0.75,
    )
    glyphs = T5Config(vocab_size=384, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    return parts.save(
        HunyuanImagePipeline,
        folder,
        transformer,
        scheduler=parts.euler(shift=5.0),
        vae=vae,
        text_encoder=parts.qwen_vl(),
        tokenizer=parts.signs_tokenizer(),
        text_encoder_2=T5EncoderModel(glyphs),
        tokenizer_2=ByT5Tokenizer(),
    )


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, output: str = "latent") -> torch.Tensor:
    pipeline, (_, height, width) = flow.pipeline, flow.sample_shape
    pipeline.tokenizer_max_length = TOKENS
    guided = scale != 1 and not flow.distilled_guidance
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=scale) if guided else None
    options = {"num_inference_steps": steps, "height": height, "width": width, "output_type": output}
    return pipeline(PROMPTS, latents=x_0, distilled_guidance_scale=scale, **options).images


def images(*given: Any) -> torch.Tensor:
    return call(*given, "pt")


OPTIONS = PipelineOptions(sequence_length=TOKENS)
LIMITS: dict[str, Any] = {
    "drops_template": True,
    "most_bytes": 20e6,  # one layer of the transformer is 2048 wide whatever its configuration says
    "why_unpredictable": "nonzero",  # tokens of a prompt come before what pads them
    "has_lora": False,
}
CASES = [
    Case("hunyuan-image", build, call, (16, (16, 24)), 3.5, options=OPTIONS, images=images, **LIMITS),
    Case(
        "hunyuan-image-distilled",
        lambda folder: build(folder, guidance_embeds=True),
        call,
        (16, (16, 24)),
        3.25,
        options=OPTIONS,
        **LIMITS,
    ),
]
