"""SkyReels V2 that begins with a picture; what its image encoder is given comes from a processor of text, too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import small_pipelines as small
import torch
from diffusers import SkyReelsV2ImageToVideoPipeline
from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2_i2v
from transformers import CLIPProcessor, CLIPVisionModelWithProjection

from families import parts, skyreels_v2, wan, wan_image

if not hasattr(pipeline_skyreels_v2_i2v, "ftfy"):  # where it is not installed: prompts here need no cleaning
    pipeline_skyreels_v2_i2v.ftfy = SimpleNamespace(fix_text=str)  # type: ignore[attr-defined]


def build(folder: Path, **settings: Any) -> Path:
    torch.manual_seed(20)
    encoder, processor = wan_image.image_encoder(CLIPVisionModelWithProjection)
    return parts.save(
        SkyReelsV2ImageToVideoPipeline,
        folder,
        skyreels_v2.transformer(**{**wan_image.SEEING, **settings}),
        tokenizer=small.t5_tokenizer(),
        text_encoder=wan.text_encoder(),
        image_encoder=encoder,
        image_processor=CLIPProcessor(processor, small.clip_tokenizer()),
        vae=wan.autoencoder(),
        scheduler=parts.euler(),
    )


CASES = [replace(wan_image.ONE, name="skyreels-v2-image", build=build)]
