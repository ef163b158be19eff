"""Full-size configurations of newer pipelines, as their model cards and diffusers' own defaults describe them."""

from __future__ import annotations

from typing import Any

from published_parts import UMT5_XXL, autoencoder, index, language_model, plain_autoencoder, video_autoencoder

Configs = dict[str, dict[str, Any]]
NAMED: dict[str, str] = {
    "Qwen/Qwen-Image": "20",
    "Tongyi-MAI/Z-Image": "6",
    "black-forest-labs/FLUX.2-dev": "32",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "14 each of two",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "1.6",
}
"""Billions of parameters of the trained network, as its publisher names them."""

QWEN_IMAGE: Configs = {
    "model_index.json": index(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        "AutoencoderKLQwenImage",
        "Qwen2_5_VLForConditionalGeneration",
    ),
    "transformer/config.json": {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "guidance_embeds": False,
        "axes_dims_rope": [16, 56, 56],
    },
    "vae/config.json": video_autoencoder("AutoencoderKLQwenImage"),
    "text_encoder/config.json": {
        "model_type": "qwen2_5_vl",
        "text_config": language_model("qwen2_5_vl_text", 3584, 28, 28, 4, 18944, vocab_size=152064),
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
    },
}
Z_IMAGE: Configs = {
    "model_index.json": index("ZImagePipeline", "ZImageTransformer2DModel", "AutoencoderKL", "Qwen3Model"),
    "transformer/config.json": {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "cap_feat_dim": 2560,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    },
    "vae/config.json": plain_autoencoder(0.3611, 0.1159),
    "text_encoder/config.json": language_model("qwen3", 2560, 36, 32, 8, 9728, vocab_size=151936, head_dim=128),
}
FLUX_2: Configs = {
    "model_index.json": index(
        "Flux2Pipeline", "Flux2Transformer2DModel", "AutoencoderKLFlux2", "Mistral3ForConditionalGeneration"
    ),
    "transformer/config.json": {
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        "in_channels": 128,
        "num_layers": 8,
        "num_single_layers": 48,
        "attention_head_dim": 128,
        "num_attention_heads": 48,
        "joint_attention_dim": 15360,
        "mlp_ratio": 3.0,
        "axes_dims_rope": [32, 32, 32, 32],
        "guidance_embeds": True,
    },
    "vae/config.json": autoencoder("AutoencoderKLFlux2", 32, patch_size=[2, 2]),
    "text_encoder/config.json": {
        "model_type": "mistral3",
        "text_config": language_model("mistral", 5120, 40, 32, 8, 32768, vocab_size=131072, head_dim=128),
        "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24},
    },
}
WAN_2_2: Configs = {
    "model_index.json": index(
        "WanPipeline",
        "WanTransformer3DModel",
        "AutoencoderKLWan",
        "UMT5EncoderModel",
        transformer_2=["diffusers", "WanTransformer3DModel"],
        boundary_ratio=0.875,
        expand_timesteps=False,
    ),
    **{
        f"{part}/config.json": {
            "_class_name": "WanTransformer3DModel",
            "patch_size": [1, 2, 2],
            "num_attention_heads": 40,
            "attention_head_dim": 128,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": 13824,
            "num_layers": 40,
            "qk_norm": "rms_norm_across_heads",
        }
        for part in ("transformer", "transformer_2")
    },
    "vae/config.json": video_autoencoder("AutoencoderKLWan", scale_factor_spatial=8, scale_factor_temporal=4),
    "text_encoder/config.json": UMT5_XXL,
}
_STAGES = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
_WIDTHS = [128, 256, 512, 512, 1024, 1024]
_SCALES: list[list[int]] = [[], [], [], [5], [5], [5]]
SANA: Configs = {
    "model_index.json": index("SanaPipeline", "SanaTransformer2DModel", "AutoencoderDC", "Gemma2Model"),
    "transformer/config.json": {
        "_class_name": "SanaTransformer2DModel",
        "in_channels": 32,
        "out_channels": 32,
        "num_attention_heads": 70,
        "attention_head_dim": 32,
        "num_layers": 20,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
        "caption_channels": 2304,
        "mlp_ratio": 2.5,
        "sample_size": 32,
        "patch_size": 1,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderDC",
        "latent_channels": 32,
        "attention_head_dim": 32,
        "encoder_block_types": _STAGES,
        "decoder_block_types": _STAGES,
        "encoder_block_out_channels": _WIDTHS,
        "decoder_block_out_channels": _WIDTHS,
        "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
        "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
        "encoder_qkv_multiscales": _SCALES,
        "decoder_qkv_multiscales": _SCALES,
        "upsample_block_type": "interpolate",
        "downsample_block_type": "conv",
        "scaling_factor": 0.41407,
    },
    "text_encoder/config.json": language_model("gemma2", 2304, 26, 8, 4, 9216, vocab_size=256000, head_dim=256),
}
PIPELINES: dict[str, Configs] = dict(zip(NAMED, (QWEN_IMAGE, Z_IMAGE, FLUX_2, WAN_2_2, SANA)))
