"""HiDream-I1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import small_pipelines
import torch
from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel
from transformers import CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM

from families import parts
from families.case import Case
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

TOKENS = 12


def build(folder: Path) -> Path:
    torch.manual_seed(8)
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=(parts.DIM, parts.DIM),
        text_emb_dim=2 * small_pipelines.POOLED,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(16, 16),
        llama_layers=(0, 1),
    )
    clip = {
        f"{part}{number}": make()
        for number in ("", "_2")
        for part, make in {
            "text_encoder": lambda: CLIPTextModelWithProjection(small_pipelines.clip_config()),
            "tokenizer": small_pipelines.clip_tokenizer,
        }.items()
    }
    return parts.save(
        HiDreamImagePipeline,
        folder,
        transformer,
        scheduler=parts.euler(use_dynamic_shifting=True, base_shift=0.3),
        vae=parts.autoencoder(),
        text_encoder_3=small_pipelines.t5_encoder(parts.DIM),
        tokenizer_3=small_pipelines.t5_tokenizer(),
        text_encoder_4=LlamaForCausalLM(LlamaConfig(**parts.text_config())),
        tokenizer_4=parts.tokenizer(),
        **clip,
    )


def call(flow: PipelineFlow, *given: Any, **kwargs: Any) -> torch.Tensor:
    flow.pipeline.default_sample_size = 8  # whose area all resolutions are brought to
    return parts.call(flow, *given, max_sequence_length=TOKENS, **kwargs)


def images(*given: Any) -> torch.Tensor:
    return call(*given, output_type="pt")


CASES = [
    Case(
        "hidream",
        build,
        call,
        sizes=(16, (8, 32)),
        options=PipelineOptions(sequence_length=TOKENS),
        images=images,
        own_noise="of the area that its transformer was made for",
        why_unpredictable="nonzero",  # which expert takes a token
    )
]
