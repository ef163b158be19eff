"""Small text encoders of today's pipelines, from their configurations, and a tokenizer with a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
)

from families.case import PROMPTS

if find_spec("torchvision") is None:  # what brings videos into shape is made with it; there are none here
    for kind in (Qwen2VLProcessor, Qwen3VLProcessor):
        kind.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])
SPECIAL = ["<|endoftext|>", "<|unknown|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LISTS = "{% for message in messages %}{{ message['role'] }}\n{{ message['content'][0]['text'] }}\n{% endfor %}"
"""A template of messages whose contents are lists, as processors of text and images take them."""
MIXED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{{ message['content'][0]['text'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template of messages of which some contents are lists."""
WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()} | {"user", "assistant", "system", "\n"})
VOCABULARY = [*SPECIAL, *WORDS]
SEEING = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
WIDTH = 16
"""Width of the text encoders."""


def tokenizer(template: str = TEMPLATE, more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token a word, line end or other sign, and one for each of `more`."""
    every = [*VOCABULARY, *more]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(every)}, unk_token=SPECIAL[1]))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[0],
        unk_token=SPECIAL[1],
        additional_special_tokens=[*SPECIAL[2:], *more],
        model_max_length=4096,
        chat_template=template,
    )


def processor(kind: type[ProcessorMixin] = Qwen2VLProcessor, template: str = TEMPLATE) -> ProcessorMixin:
    """The same, with the marks of pictures and videos, and with what brings pictures into shape."""
    return kind(Qwen2VLImageProcessor(), tokenizer(template, more=SEEING), chat_template=template)


def _text(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(VOCABULARY),
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def qwen3_config(layers: int = 2) -> Qwen3Config:
    """The configuration of a Qwen3 model of text."""
    return Qwen3Config(**_text(layers))


def qwen_vl(sees: bool = False) -> torch.nn.Module:
    """A Qwen2.5-VL, for `processor` where it sees pictures."""
    text, marks = _text(2), {}
    if sees:
        text["vocab_size"] += len(SEEING)
        names = "vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"
        marks = {name: len(VOCABULARY) + i for i, name in enumerate(names)}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **marks)
    )


def mistral(layers: int) -> torch.nn.Module:
    """A Mistral 3, that sees no pictures here."""
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config={"model_type": "mistral", **_text(layers)}, vision_config=vision)
    )


def qwen3_vl_config(layers: int) -> Qwen3VLConfig:
    """The configuration of a Qwen3-VL."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    return Qwen3VLConfig(text_config={**_text(layers), "rope_parameters": rope}, vision_config=vision)


def qwen3_vl() -> torch.nn.Module:
    """A Qwen3-VL, that sees no pictures here."""
    return Qwen3VLModel(qwen3_vl_config(2))


def qwen3_vl_generator(layers: int) -> torch.nn.Module:
    """The same with a head for words."""
    return Qwen3VLForConditionalGeneration(qwen3_vl_config(layers))
