"""Full-size pipelines as their published configurations describe them, without weights: to predict, to build at random.

Written down from the model cards and papers' numbers of layers and widths; what has no part in memory is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import newer_architectures
from published_parts import T5_XXL, clip, plain_autoencoder

Configs = dict[str, dict[str, Any]]


def _sd3(layers: int, positions: int, **more: Any) -> Configs:
    """The width of a Stable Diffusion 3 follows from its depth: a head of 64 for each layer."""
    return {
        "model_index.json": {
            "_class_name": "StableDiffusion3Pipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "text_encoder_3": ["transformers", "T5EncoderModel"],
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "transformer/config.json": {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": layers,
            "attention_head_dim": 64,
            "num_attention_heads": layers,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 64 * layers,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": positions,
            **more,
        },
        "vae/config.json": plain_autoencoder(1.5305, 0.0609),
        "text_encoder/config.json": clip(768, 12),
        "text_encoder_2/config.json": clip(1280, 32),
        "text_encoder_3/config.json": T5_XXL,
        "tokenizer/tokenizer_config.json": {"model_max_length": 77},
    }


FLUX: Configs = {
    "model_index.json": {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "transformer/config.json": {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    },
    "vae/config.json": plain_autoencoder(0.3611, 0.1159),
    "text_encoder/config.json": clip(768, 12, projected=False),
    "text_encoder_2/config.json": T5_XXL,
    "tokenizer/tokenizer_config.json": {"model_max_length": 77},
}
PIPELINES: dict[str, Configs] = {
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3(24, 192),
    "stabilityai/stable-diffusion-3.5-medium": _sd3(24, 384, qk_norm="rms_norm", dual_attention_layers=list(range(13))),
    "stabilityai/stable-diffusion-3.5-large": _sd3(38, 192, qk_norm="rms_norm"),
    "black-forest-labs/FLUX.1-dev": FLUX,
    **newer_architectures.PIPELINES,
}


def write(name: str, folder: Path, changes: Configs | None = None) -> str:
    """Write a pipeline's configuration as a folder that `--env.flow` reads; the folder.

    `changes`: by file, what it is to say instead.
    """
    for file, config in PIPELINES[name].items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps({**config, **(changes or {}).get(file, {})}))
    return str(folder)
