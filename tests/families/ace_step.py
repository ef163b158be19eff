"""ACE-Step, which draws sounds: 32 values a frame of latents, 8 frames a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AceStepPipeline, AceStepTransformer1DModel, AutoencoderOobleck
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from small_pipelines import louder
from transformers import Qwen3Model

from families import encoders, parts
from families.case import PROMPTS, Case
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

CHANNELS, TOKENS = 4, 80


def build(folder: Path, **more: Any) -> Path:
    torch.manual_seed(15)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 8, "sliding_window": 4}
    condition = AceStepConditionEncoder(
        text_hidden_dim=encoders.WIDTH,
        timbre_hidden_dim=CHANNELS,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        **sizes,
    )
    condition.silence_latent.normal_()
    vae = AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[4, 8],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=CHANNELS,
        sampling_rate=256,
    )
    transformer = AceStepTransformer1DModel(
        num_hidden_layers=2, in_channels=3 * CHANNELS, audio_acoustic_hidden_dim=CHANNELS, **sizes, **more
    )
    return parts.save(
        AceStepPipeline,
        folder,
        transformer,
        scheduler=parts.euler(num_train_timesteps=1, shift=1.0),
        vae=vae,
        text_encoder=louder(Qwen3Model(encoders.qwen3_config())),
        tokenizer=encoders.tokenizer(),
        condition_encoder=louder(condition),
    )


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, output: str = "latent") -> torch.Tensor:
    """Prompt by prompt: of several, the pipeline shows its network what pads them."""
    seconds = x_0.shape[2] / flow.pipeline.latents_per_second
    options = {"num_inference_steps": steps, "guidance_scale": scale, "audio_duration": seconds, "output_type": output}
    latents = x_0.transpose(1, 2)
    drawn = torch.cat([flow.pipeline(p, latents=x[None], **options).audios for p, x in zip(PROMPTS, latents)])
    return drawn if output == "pt" else drawn.transpose(1, 2)


def sounds(*given: Any) -> torch.Tensor:
    return call(*given, "pt")


CASES = [
    Case(
        "ace-step",
        build,
        call,
        sizes=(16, 21),
        sized_by="frames",
        scale=1.0,
        options=PipelineOptions(sequence_length=TOKENS),
        images=sounds,
        why_unpredictable="_local_scalar_dense",  # lengths of the prompts
    )
]
