"""Wan 2.1, and both forms of 2.2: two networks by time, and a time per token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import small_pipelines as small
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from families.case import PROMPTS, Case
from flowrl.models.pipeline import PipelineFlow, PipelineOptions


def transformer(**settings: Any) -> torch.nn.Module:
    network = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        **{"in_channels": 4, **settings},
        out_channels=4,
        text_dim=small.T5_DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return small.louder(network)


def autoencoder() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.1, 0.9, 1.3, 0.7],
    )


def text_encoder() -> UMT5EncoderModel:
    sizes = {"d_model": small.T5_DIM, "d_ff": 48, "d_kv": 16, "num_layers": 2, "num_heads": 2}
    return UMT5EncoderModel(UMT5Config(vocab_size=3 + len(small.WORDS), **sizes))


def wan(folder: Path, two: bool = False, cls: Any = WanPipeline, **settings: Any) -> Path:
    torch.manual_seed(4)
    pipeline = cls(
        tokenizer=small.t5_tokenizer(),
        text_encoder=text_encoder(),
        vae=autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer(),
        transformer_2=transformer() if two else None,
        **settings,
    )
    pipeline.save_pretrained(folder)
    return folder


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, output_type: str = "latent") -> torch.Tensor:
    frames, _, height, width = flow.sample_shape
    return flow.pipeline(
        PROMPTS,
        latents=x_0,
        guidance_scale=scale,
        num_inference_steps=steps,
        height=height,
        width=width,
        num_frames=frames,
        max_sequence_length=flow.max_sequence_length,
        output_type=output_type,
    ).frames


def videos(*given: Any) -> torch.Tensor:
    return call(*given, output_type="pt")


def load_both(flow: PipelineFlow, folder: Path) -> None:
    flow.pipeline.load_lora_weights(folder)
    flow.pipeline.load_lora_weights(folder, weight_name="transformer_2_lora.safetensors", load_into_transformer_2=True)


OPTIONS = PipelineOptions(frames=5, sequence_length=12)
WAN = Case("wan-2.1", wan, call, sizes=(16, (32, 16)), options=OPTIONS, images=videos)
CASES = [
    WAN,
    replace(
        WAN,
        name="wan-2.2-two",
        build=lambda folder: wan(folder, two=True, boundary_ratio=0.65),
        images=None,
        load_adapter=load_both,
    ),
    replace(WAN, name="wan-2.2-tokens", build=lambda folder: wan(folder, expand_timesteps=True), images=None),
]
