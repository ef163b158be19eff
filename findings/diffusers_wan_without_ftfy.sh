#!/usr/bin/env bash
# diffusers: without ftfy, which it does not ask for, WanPipeline encodes prompts and WanImageToVideoPipeline ends in a
# NameError: of two pipelines side by side one looks whether the library is there before it cleans prompts by it, the
# other imports it if it is there and takes it always.
#
#     findings/diffusers_wan_without_ftfy.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, transformers 5.23.0, torch 2.13.0: (1, 8, 16) of the first, "name 'ftfy' is not defined" of
# the second. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0 torch==2.13.0
cat >"$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version
from importlib.util import find_spec

from diffusers import WanImageToVideoPipeline, WanPipeline
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

print({name: version(name) for name in ("diffusers", "transformers", "torch")}, "ftfy:", find_spec("ftfy"))
words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "stars": 3}, unk_token="<unk>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
encoder = UMT5EncoderModel(UMT5Config(vocab_size=4, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2))
parts = {"tokenizer": tokenizer, "text_encoder": encoder, "vae": None, "scheduler": None, "transformer": None}
given = {"do_classifier_free_guidance": False, "max_sequence_length": 8, "device": "cpu"}
shape = tuple(WanPipeline(**parts).encode_prompt("stars", **given)[0].shape)
print("WanPipeline:", shape)
try:
    WanImageToVideoPipeline(**parts).encode_prompt("stars", **given)
except NameError as error:
    print("WanImageToVideoPipeline: NameError:", error)
    sys.exit(shape != (1, 8, 16))
sys.exit("WanImageToVideoPipeline encodes prompts")
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
