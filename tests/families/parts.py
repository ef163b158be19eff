"""Parts that small random pipelines of several classes are made of, and what their calls have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from small_pipelines import WORDS, clip_config, clip_tokenizer, louder
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from families.case import PROMPTS
from flowrl.models.pipeline import PipelineFlow

DIM = 32
"""Width of text encoders."""
VOCABULARY = ["<pad>", "<end>", "<unk>", "<begin>", *(f"▁{word}" for word in WORDS)]


def tokenizer(begin: bool = True, end: bool = False, side: str = "right") -> PreTrainedTokenizerFast:
    """Words of the prompts, between marks of beginning and end."""
    made = Tokenizer(models.Unigram([(word, -float(i > 3)) for i, word in enumerate(VOCABULARY)], unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    marks = [("<begin>", 3)] * begin + [("<end>", 1)] * end
    template = " ".join(["<begin>"] * begin + ["$A"] + ["<end>"] * end)
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        bos_token="<begin>",
        padding_side=side,
        model_max_length=512,
    )


def text_config() -> dict[str, Any]:
    """Sizes of a small language model."""
    return {
        "vocab_size": len(VOCABULARY),
        "hidden_size": DIM,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 3,
    }


def gemma2() -> Gemma2Model:
    return Gemma2Model(Gemma2Config(**text_config()))


def autoencoder(levels: int = 2, **config: Any) -> AutoencoderKL:
    """An autoencoder of 4 channels that halves sides `levels` - 1 times."""
    settings = {
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
        "scaling_factor": 1.5,
        "shift_factor": 0.06,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return AutoencoderKL(**(settings | config))


def euler(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})


def save(kind: type, folder: Path, transformer: torch.nn.Module, **parts: Any) -> Path:
    """Save a pipeline of such parts, the network with larger weights."""
    kind(transformer=louder(transformer), **parts).save_pretrained(folder)
    return folder


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, **kwargs: Any) -> torch.Tensor:
    """What a pipeline's own call gives that takes latents as they are, and a guidance scale."""
    _, height, width = flow.sample_shape
    options = {"num_inference_steps": steps, "height": height, "width": width, "output_type": "latent", **kwargs}
    return flow.pipeline(PROMPTS, latents=x_0, guidance_scale=scale, **options).images


def signs_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or row of other signs: templates of chats are long enough for what pipelines cut off them."""
    made = Tokenizer(models.WordLevel({word.lstrip("▁"): i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", model_max_length=512
    )


def clip() -> dict[str, Any]:
    """A CLIP of the usual 77 tokens and its tokenizer, as second text encoder."""
    config = clip_config()
    config.max_position_embeddings = 77
    return {"text_encoder_2": CLIPTextModel(config), "tokenizer_2": clip_tokenizer()}


def qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL that sees no pictures here."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": DIM}
    text = {**text_config(), "num_hidden_layers": 3, "rope_parameters": rope}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
