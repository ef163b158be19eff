"""HunyuanVideo, guidance-distilled, and with classifier-free guidance beside that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import small_pipelines as small
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from families.case import PROMPTS, Case
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

TEXT_DIM = 16


def autoencoder() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
        mid_block_add_attention=False,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words and marks, with as many for the pipeline's template as that is cut to, or a few more."""
    words = {token: i for i, token in enumerate(("<pad>", "<unk>", *small.WORDS))}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", padding_side="right", model_max_length=512
    )


def hunyuan_video(folder: Path) -> Path:
    torch.manual_seed(6)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=small.POOLED,
        rope_axes_dim=(4, 4, 4),
    )
    llama = LlamaConfig(
        vocab_size=2 + len(small.WORDS),
        hidden_size=TEXT_DIM,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        pad_token_id=0,
    )
    clip = small.clip_config()
    clip.max_position_embeddings = 77
    pipeline = HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama),
        tokenizer=tokenizer(),
        transformer=small.louder(transformer),
        vae=autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel(clip),
        tokenizer_2=small.clip_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, output_type: str = "latent") -> torch.Tensor:
    frames, _, height, width = flow.sample_shape
    guidance: dict[str, Any] = {"guidance_scale": scale}
    if not flow.distilled_guidance:
        guidance = {"guidance_scale": flow.embedded_guidance, "true_cfg_scale": scale}
        guidance["negative_prompt"] = [""] * len(PROMPTS)
    return flow.pipeline(
        PROMPTS,
        latents=x_0,
        num_inference_steps=steps,
        height=height,
        width=width,
        num_frames=frames,
        max_sequence_length=flow.max_sequence_length,
        output_type=output_type,
        **guidance,
    ).frames


def videos(*given: Any) -> torch.Tensor:
    return call(*given, output_type="pt")


OPTIONS = PipelineOptions(frames=5, sequence_length=24)
HUNYUAN = Case(
    "hunyuan-video", hunyuan_video, call, sizes=(16, (32, 16)), options=OPTIONS, images=videos, drops_template=True
)
CASES = [
    HUNYUAN,
    replace(HUNYUAN, name="hunyuan-video-cfg", options=replace(OPTIONS, embedded_guidance=6.0), images=None),
]
