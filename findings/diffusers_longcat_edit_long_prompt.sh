#!/usr/bin/env bash
# diffusers: a prompt of LongCatImageEditPipeline that has more than 512 tokens ends in a TypeError, where it is to be cut
# with a warning: the warning asks for `len(len(all_tokens))`. LongCatImagePipeline, which it was made from, cuts it.
#
#     findings/diffusers_longcat_edit_long_prompt.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, transformers 5.23.0: of 600 words a TypeError, of 5 an embedding. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat >"$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version
from types import SimpleNamespace

import torch
from diffusers import LongCatImageEditPipeline, LongCatImagePipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

print({name: version(name) for name in ("diffusers", "transformers")})
words = Tokenizer(models.WordLevel({"<pad>": 0, "white": 1, "<|vision_start|>": 2}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


class Pictures:
    """What brings a picture into shape, of one token."""

    merge_size = 1

    def __call__(self, images, return_tensors):
        return {"pixel_values": torch.zeros(1, 1), "image_grid_thw": torch.ones(1, 3, dtype=torch.long)}


def made(kind: type):
    """A pipeline without networks: an encoder that gives zeros."""
    without = type("WithoutNetworks", (kind,), {"device": torch.device("cpu")})
    pipeline = without.__new__(without)
    pipeline.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", additional_special_tokens=["<|vision_start|>"]
    )
    pipeline.image_processor_vl, pipeline.image_token, pipeline.tokenizer_max_length = Pictures(), "<image>", 512
    pipeline.prompt_template_encode_prefix, pipeline.prompt_template_encode_suffix = "x <|vision_start|>", "x"
    pipeline.text_encoder = lambda input_ids, **named: SimpleNamespace(hidden_states=[torch.zeros(*input_ids.shape, 4)])
    return pipeline


seen = {}
for n in (5, 600):
    for kind, given in ((LongCatImageEditPipeline, [None]), (LongCatImagePipeline, [])):
        try:
            seen[kind, n] = tuple(made(kind)._encode_prompt(["white " * n], *given).shape)
        except TypeError as error:
            seen[kind, n] = f"TypeError: {error}"
        print(f"{kind.__name__}, {n} words: {seen[kind, n]}")
failed = [key for key, found in seen.items() if isinstance(found, str)]
sys.exit(failed != [(LongCatImageEditPipeline, 600)])
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
