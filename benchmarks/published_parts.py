"""Sizes of text encoders and autoencoders that several published pipelines have."""

from __future__ import annotations

from typing import Any

T5_XXL: dict[str, Any] = {
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
UMT5_XXL = {**T5_XXL, "model_type": "umt5", "vocab_size": 256384}


def clip(width: int, layers: int, projected: bool = True) -> dict[str, Any]:
    """Describe a CLIP text encoder."""
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


def language_model(kind: str, width: int, layers: int, heads: int, kv: int, mlp: int, **more: Any) -> dict[str, Any]:
    """Describe a language model by its widths, layers, heads and heads of keys and values."""
    return {
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": mlp,
        **more,
    }


def autoencoder(kind: str = "AutoencoderKL", channels: int = 16, **more: Any) -> dict[str, Any]:
    """Describe an autoencoder of images of the widths that most have."""
    return {
        "_class_name": kind,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": channels,
        **more,
    }


def plain_autoencoder(scaling_factor: float, shift_factor: float) -> dict[str, Any]:
    """Describe an autoencoder of images without convolutions around the latents."""
    scale = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
    return autoencoder(**scale, use_quant_conv=False, use_post_quant_conv=False)


def video_autoencoder(kind: str, **more: Any) -> dict[str, Any]:
    """Describe Wan's causal autoencoder of videos, which Qwen-Image has for images."""
    return {
        "_class_name": kind,
        "base_dim": 96,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.0] * 16,
        "latents_std": [1.0] * 16,
        **more,
    }


def index(kind: str, transformer: str, vae: str, encoder: str, **more: Any) -> dict[str, Any]:
    """Describe a pipeline of one text encoder."""
    return {
        "_class_name": kind,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", encoder],
        "tokenizer": ["transformers", "AutoTokenizer"],
        "transformer": ["diffusers", transformer],
        "vae": ["diffusers", vae],
        **more,
    }
