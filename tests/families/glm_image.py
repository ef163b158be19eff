"""GLM-Image, whose language model draws the tokens of a small preview before an image's.

That has 256 tokens whatever the size of the image, which take most of a second to draw; here it has one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import GlmImagePipeline, GlmImageTransformer2DModel
from transformers import (
    ByT5Tokenizer,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessorPil,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from families import encoders, parts
from families.case import PROMPTS, Case
from flowrl.models.pipeline import PipelineFlow, PipelineOptions
from flowrl.models.text_encoders import seed_of

TOKENS, CODES = 24, 64
TEMPLATE = "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"
target_shape = GlmImageProcessor._get_target_shape
GlmImageProcessor._get_target_shape = lambda *given, **named: (*target_shape(*given, **named)[:2], 1, 1)


def language_model() -> GlmImageForConditionalGeneration:
    text = {"vocab_size": CODES + 2, "vision_vocab_size": CODES, "eos_token_id": CODES + 1, "pad_token_id": 0}
    text |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 1024}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "patch_size": 16}
    codes = {"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 16}
    marks = {"image_token_id": 5, "image_start_token_id": 6, "image_end_token_id": 7}
    return GlmImageForConditionalGeneration(
        GlmImageConfig(text_config=text, vision_config={**vision, "image_size": 64}, vq_config=codes, **marks)
    )


def processor() -> GlmImageProcessor:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=encoders.tokenizer().backend_tokenizer,
        pad_token=encoders.SPECIAL[0],
        unk_token=encoders.SPECIAL[1],
        bos_token=encoders.SPECIAL[2],
        padding_side="left",
        extra_special_tokens={
            name: encoders.SPECIAL[3 + i] for i, name in enumerate(("grid_bos_token", "grid_eos_token", "image_token"))
        },
    )
    return GlmImageProcessor(GlmImageImageProcessorPil(), tokenizer, chat_template=TEMPLATE)


def build(folder: Path) -> Path:
    torch.manual_seed(12)
    transformer = GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=parts.DIM,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=CODES,
    )
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}
    return parts.save(
        GlmImagePipeline,
        folder,
        transformer,
        scheduler=parts.euler(**dynamic),
        vae=parts.autoencoder(4, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 0.7]),
        text_encoder=T5EncoderModel(T5Config(vocab_size=384, d_model=parts.DIM, d_ff=32, d_kv=8, num_layers=1)),
        tokenizer=ByT5Tokenizer(),
        vision_language_encoder=language_model(),
        processor=processor(),
    )


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, output: str = "latent") -> torch.Tensor:
    """Prompt by prompt, whose seeds are their own; of several, the pipeline shows its network what pads them."""
    _, height, width = flow.sample_shape
    options = {"num_inference_steps": steps, "height": height, "width": width, "output_type": output}

    def drawn(prompt: str, x: torch.Tensor) -> torch.Tensor:
        by = torch.Generator().manual_seed(seed_of(quoting(prompt)))
        given = flow.pipeline(quoting(prompt), latents=x[None], guidance_scale=scale, generator=by, **options)
        return given.images

    return torch.cat([drawn(prompt, x) for prompt, x in zip(PROMPTS, x_0)])


def quoting(prompt: str) -> str:
    """A prompt that quotes its first word."""
    first, _, rest = prompt.partition(" ")
    return f'"{first}" {rest}'


def images(*given: Any) -> torch.Tensor:
    return call(*given, "pt")


CASES = [
    Case(
        "glm-image",
        build,
        call,
        sizes=(32, (32, 64)),
        scale=1.5,
        options=PipelineOptions(sequence_length=TOKENS),
        images=images,
        why_unpredictable="nonzero",  # whose image tokens are left out
        has_lora=False,
        context=quoting,
    )
]
