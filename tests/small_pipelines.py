"""Pipelines in diffusers' own format, small and with random weights, as the adapters' tests need them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from flowrl.models.loading import ASSETS

PROMPTS = ["three red stars on blue", "white circles", "two green squares on black"]
WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})
POOLED, T5_DIM = 32, 32


def sd3(folder: Path, t5: bool = True, **scheduler: Any) -> Path:
    """A `StableDiffusion3Pipeline` with or without T5."""
    torch.manual_seed(1)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * POOLED,
        caption_projection_dim=32,
        pooled_projection_dim=2 * POOLED,
        pos_embed_max_size=16,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=louder(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=autoencoder(),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(2 * POOLED) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )
    pipeline.save_pretrained(folder)
    return folder


def flux(folder: Path, guidance_embeds: bool = True, cls: Any = FluxPipeline) -> Path:
    """A `FluxPipeline`, guidance-distilled as FLUX.1-dev or not as FLUX.1-schnell; the schedule's shift is dynamic.

    `cls`: another class of the same parts.
    """
    torch.manual_seed(2)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_DIM,
        pooled_projection_dim=POOLED,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    pipeline = cls(
        transformer=louder(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance_embeds),
        vae=autoencoder(),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(T5_DIM),
        tokenizer_2=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def louder(network: torch.nn.Module) -> torch.nn.Module:
    """Larger weights: of a network as initialised, prompts and guidance hardly change the velocity."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=150,
        hidden_size=POOLED,
        intermediate_size=48,
        projection_dim=POOLED,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def clip_tokenizer() -> CLIPTokenizer:
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "mini-sd3" / "tokenizer")
    tokenizer.model_max_length = 16
    return tokenizer


def t5_encoder(dim: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=3 + len(WORDS), d_model=dim, d_ff=48, d_kv=16, num_layers=2, num_heads=2))


def t5_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")] + [(f"▁{word}", -2.0) for word in WORDS]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
