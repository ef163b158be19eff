"""Full-size pipelines as their published configurations describe them, without weights: to predict, to build at random.

Written down from the model cards and papers' numbers of layers and widths; what has no part in memory is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import newer_architectures

Configs = dict[str, dict[str, Any]]


def _clip(width: int, layers: int, projected: bool = True) -> dict[str, Any]:
    return {
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        **({"projection_dim": width} if projected else {}),
    }


T5_XXL = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
}


def _vae(scaling_factor: float, shift_factor: float) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


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
        "vae/config.json": _vae(1.5305, 0.0609),
        "text_encoder/config.json": _clip(768, 12),
        "text_encoder_2/config.json": _clip(1280, 32),
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
    "vae/config.json": _vae(0.3611, 0.1159),
    "text_encoder/config.json": _clip(768, 12, projected=False),
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
