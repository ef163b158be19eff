"""HunyuanVideo 1.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import small_pipelines as small
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
)

from families.case import PROMPTS, Case
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

TEXT_DIM = 16
TEMPLATE = 108
"""Tokens of the pipeline's template before the prompt, which are cut off."""


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words whose template has as many before the prompt as the pipeline cuts off."""
    words = {token: i for i, token in enumerate(("<pad>", "<unk>", *small.WORDS))}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=2000,
        chat_template="x " * TEMPLATE + "{{ messages[1]['content'] }} x",
    )


def hunyuan_video15(folder: Path, kind: Any = HunyuanVideo15Pipeline, layers: int = 3, **more: Any) -> Path:
    torch.manual_seed(8)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=layers,
        num_refiner_layers=1,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(4, 4, 4),
        task_type="t2v" if kind is HunyuanVideo15Pipeline else "i2v",
    )
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=2 + len(small.WORDS),
        hidden_size=TEXT_DIM,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    sizes = {"d_model": 8, "d_ff": 16, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    pipeline = kind(
        text_encoder=Qwen2_5_VLTextModel(qwen),
        tokenizer=tokenizer(),
        transformer=small.louder(transformer),
        vae=AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=384, **sizes)),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        **more,
    )
    pipeline.save_pretrained(folder)
    return folder


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, **options: Any) -> torch.Tensor:
    frames, _, height, width = flow.sample_shape
    flow.pipeline.guider = ClassifierFreeGuidance(guidance_scale=scale)
    flow.pipeline.tokenizer_max_length = flow.max_sequence_length
    flow.pipeline.tokenizer_2_max_length = 12
    flow.pipeline.vision_num_semantic_tokens = 8  # of 729, all masked
    return flow.pipeline(
        **{"prompt": PROMPTS, "output_type": "latent", **options},
        latents=x_0,
        num_inference_steps=steps,
        height=height,
        width=width,
        num_frames=frames,
    ).frames


def videos(flow: PipelineFlow, x_0: torch.Tensor, *given: Any) -> torch.Tensor:
    """Videos one by one: the pipeline cannot decode several."""
    each = zip(PROMPTS, x_0.split(1))
    return torch.cat([call(flow, x, *given, prompt=[prompt], output_type="pt") for prompt, x in each])


CASES = [
    Case(
        "hunyuan-video-1.5",
        hunyuan_video15,
        call,
        sizes=(32, (64, 32)),
        options=PipelineOptions(frames=5, sequence_length=12),
        images=videos,
        why_unpredictable="_local_scalar_dense",  # lengths of the prompts
        has_lora=False,
        most_bytes=20e6,  # a projection of 2048 x 2048 is fixed in the transformer's code
    )
]
