#!/usr/bin/env bash
# diffusers with transformers 5: QwenImageEditPipeline's text encoder no longer knows where the picture's tokens are.
# Qwen2.5-VL gives the tokens of a picture their rows and columns as positions. Up to version 4 transformers finds them
# by the token ids; from version 5 on it is told by `mm_token_type_ids`, which its processor makes, and which the
# pipeline does not hand on: all tokens are then counted in one row, without an error or a warning. The same prompt,
# picture and weights give other embeddings by the version of transformers. (QwenImageEditPlusPipeline, the inpainting
# form and LongCatImageEditPipeline call the encoder in the same way, as their code says; they are not run here.)
#
#     findings/diffusers_qwen_edit_positions.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1 and transformers 5.23.0, beside transformers 4.57.6 called with the same arguments (diffusers
# 0.42.1 takes none before version 5); torch 2.13.0, small random weights: the pipeline's embeddings, of deviation 1.01, are
# up to 2.69 from those with 4.57.6. The encoder of 5.23.0 gives those of 4.57.6, within rounding, when it is given
# `mm_token_type_ids`, too. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/old"
python3 -m venv "$work/new"
"$work/old/bin/pip" install --quiet torch==2.13.0 transformers==4.57.6
"$work/new/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 diffusers==0.42.1
cat >"$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import BatchFeature, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

IMAGE, MARKS = 90, {"vision_start_token_id": 91, "vision_end_token_id": 92, "video_token_id": 93}
folder, is_new = Path(sys.argv[1]), version("transformers") >= "5"
text = dict(
    vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=0, pad_token_id=0,
)
rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
text |= {"rope_parameters": {**rope, "rope_theta": 1e6}} if is_new else {"rope_scaling": rope, "rope_theta": 1e6}
vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, **MARKS)
torch.manual_seed(0)
encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
if not is_new:
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.copy_(torch.randn_like(weight) * (0.4 if weight.ndim > 1 else 0.1) + (weight.ndim == 1))
    save_file({name: value.clone() for name, value in encoder.state_dict().items()}, folder / "weights")
encoder.load_state_dict(load_file(folder / "weights"))

ids = torch.tensor([[*range(1, 65), 91, *[IMAGE] * 16, 92, *range(1, 7)]])  # 64 are dropped as those of the template
given = {
    "input_ids": ids, "attention_mask": torch.ones_like(ids), "image_grid_thw": torch.tensor([[1, 8, 8]]),
    "pixel_values": torch.randn(64, 1176, generator=torch.Generator().manual_seed(0)),
}
if not is_new:
    with torch.no_grad():
        embeds = encoder(**given, output_hidden_states=True).hidden_states[-1][:, 64:]
    save_file({"embeds": embeds.contiguous()}, folder / "embeds")
    sys.exit(0)
from diffusers import QwenImageEditPipeline

pipeline = QwenImageEditPipeline(
    scheduler=None, vae=None, text_encoder=encoder, tokenizer=None, processor=None, transformer=None
)
pipeline.processor = lambda **named: BatchFeature({**given, "mm_token_type_ids": (ids == IMAGE).int()})
with torch.no_grad():
    own = pipeline.encode_prompt(["a prompt"], image=["a picture"], device="cpu")[0]
with torch.no_grad():
    told = encoder(**given, mm_token_type_ids=(ids == IMAGE).int(), output_hidden_states=True).hidden_states[-1][:, 64:]
old = load_file(folder / "embeds")["embeds"]
print({name: version(name) for name in ("diffusers", "torch", "transformers")})
print("deviation of the embeddings:", round(old.std().item(), 3))
changed, mended = ((other - old).abs().max().item() for other in (own, told))
print("the pipeline's own against those with transformers 4:", round(changed, 2))
print("with mm_token_type_ids against those with transformers 4:", mended)
sys.exit(not (changed > 1 and mended < 1e-4))
PYTHON
for venv in old new; do
    "$work/$venv/bin/python" "$work/look.py" "$work" || { echo "they do otherwise than stated" >&2; exit 1; }
done
