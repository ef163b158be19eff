#!/usr/bin/env bash
# transformers: without torchvision Qwen2VLProcessor cannot be made of a tokenizer and an image processor, though that
# needs no torchvision any more (Qwen2VLImageProcessorPil), and no video is asked for. The error names neither
# torchvision nor what is missing, so that pipelines of diffusers with such a processor (Qwen-Image-Edit and others) look
# damaged.
#
#     findings/transformers_processor_without_torchvision.sh     # installs into a temporary folder
#
# Seen with transformers 5.23.0, torch 2.13.0, no torchvision: AttributeError, "type object 'VIDEO_PROCESSOR_MAPPING' has
# no attribute '_extra_content'". The image processor by itself works. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 pillow==12.3.0
cat >"$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version
from importlib.util import find_spec

from PIL import Image
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen2VLProcessor

print({name: version(name) for name in ("transformers", "torch")}, "torchvision:", find_spec("torchvision"))
pictures = Qwen2VLImageProcessorPil()
seen = pictures(Image.new("RGB", (56, 56)), return_tensors="pt")
print("the image processor alone gives", tuple(seen["pixel_values"].shape))
words = Tokenizer(models.WordLevel({"a": 0, "<|image_pad|>": 1, "<|video_pad|>": 2}, unk_token="a"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a", pad_token="a")
try:
    Qwen2VLProcessor(pictures, tokenizer)
except AttributeError as error:
    print("AttributeError:", error)
    sys.exit("torchvision" in str(error) or tuple(seen["pixel_values"].shape) != (16, 1176))
sys.exit("the processor was made")
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "transformers does otherwise than stated" >&2; exit 1; }
