"""SkyReels V2, with causal blocks of frames."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import small_pipelines as small
import torch
from diffusers import SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel
from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2

from families import parts, wan
from families.case import Case

if not hasattr(pipeline_skyreels_v2, "ftfy"):  # where it is not installed: prompts here need no cleaning
    pipeline_skyreels_v2.ftfy = SimpleNamespace(fix_text=str)  # type: ignore[attr-defined]


def transformer(**settings: Any) -> torch.nn.Module:
    return SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        **{"in_channels": 4, **settings},
        out_channels=4,
        text_dim=small.T5_DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )


def build(folder: Path, **settings: Any) -> Path:
    torch.manual_seed(19)
    return parts.save(
        SkyReelsV2Pipeline,
        folder,
        transformer(**settings),
        tokenizer=small.t5_tokenizer(),
        text_encoder=wan.text_encoder(),
        vae=wan.autoencoder(),
        scheduler=parts.euler(),
    )


CASES = [
    Case("skyreels-v2", build, wan.call, sizes=(16, (32, 16)), options=wan.OPTIONS, images=wan.videos),
]
