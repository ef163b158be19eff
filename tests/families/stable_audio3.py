"""Stable Audio 3, not distilled: 16 values a frame of latents, 16 frames a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderSAME, StableAudio3DiTModel, StableAudio3Pipeline
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder
from small_pipelines import louder
from torch import nn
from transformers import T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

from families import parts
from families.case import PROMPTS, Case
from families.prx import load_adapter
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

CHANNELS, TOKENS = 4, 12


def build(folder: Path, **scheduler: Any) -> Path:
    torch.manual_seed(17)
    sizes = {**parts.text_config(), "num_hidden_layers": 1, "sliding_window": 16}
    text = T5GemmaModuleConfig(**sizes)
    encoder = T5GemmaEncoderModel(T5GemmaConfig(encoder=text, decoder=text, is_encoder_decoder=False))
    vae = AutoencoderSAME(
        patch_size=4,
        encoder_channels=4,
        encoder_c_mults=(4,),
        encoder_strides=(4,),
        encoder_transformer_depths=(1,),
        latent_dim=CHANNELS,
        dim_heads=8,
        sampling_rate=256,
    )
    transformer = StableAudio3DiTModel(
        io_channels=CHANNELS,
        embed_dim=16,
        depth=1,
        num_heads=2,
        cond_token_dim=parts.DIM,
        global_cond_dim=parts.DIM,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        num_memory_tokens=2,
    )
    for weight in [*vae.parameters(), *transformer.parameters()]:
        if not weight.any():  # what a new network would leave out
            nn.init.normal_(weight, std=0.3)
    words = parts.tokenizer()
    words.model_max_length = TOKENS
    return parts.save(
        StableAudio3Pipeline,
        folder,
        transformer,
        vae=vae,
        text_encoder=louder(encoder),
        tokenizer=words,
        duration_embedder=StableAudio3DurationEmbedder(output_dim=parts.DIM, fourier_dim=8, max_val=4.0),
        scheduler=parts.euler(**{"num_train_timesteps": 1, "shift": 1.0, **scheduler}),
    )


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, output: str = "latent") -> torch.Tensor:
    options = {"num_inference_steps": steps, "guidance_scale": scale, "duration": x_0.shape[2] / 16}
    return flow.pipeline(PROMPTS, latents=x_0, output_type=output, **options).audios


CASES = [
    Case(
        "stable-audio-3",
        build,
        call,
        sizes=(16, 21),
        sized_by="frames",
        options=PipelineOptions(sequence_length=TOKENS),
        images=lambda *given: call(*given, output="pt"),
        load_adapter=load_adapter,
    )
]
