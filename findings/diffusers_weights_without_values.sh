#!/usr/bin/env bash
# diffusers: from_pretrained says that weights which the files lack "are newly initialized", and leaves them without
# values on the meta device. The usual way there: a pipeline saved with a LoRA still attached, as its layers are saved
# under other names ("to_q.base_layer.weight"). Loading succeeds; the first use or move to a device is what fails.
#
#     findings/diffusers_weights_without_values.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, torch 2.13.0, peft 0.21.2, accelerate 1.15.0: 4 parameters on "meta". Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet \
    diffusers==0.42.1 torch==2.13.0 peft==0.21.2 accelerate==1.15.0 transformers==5.23.0 safetensors==0.8.0
cat >"$work/look.py" <<'PYTHON'
import io
import logging
import sys
from importlib.metadata import version

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig

print({name: version(name) for name in ("diffusers", "torch", "peft", "accelerate", "transformers")})
torch.manual_seed(0)
network = SD3Transformer2DModel(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
    pos_embed_max_size=8,
)
network.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
network.save_pretrained(sys.argv[1])
said = io.StringIO()
logging.getLogger("diffusers").addHandler(logging.StreamHandler(said))
loaded = SD3Transformer2DModel.from_pretrained(sys.argv[1])
empty = [name for name, parameter in loaded.named_parameters() if parameter.is_meta]
claimed = "newly initialized" in said.getvalue()
print(f"said to be newly initialized: {claimed}; parameters without values: {empty}")
sys.exit(not (claimed and len(empty) == 4))
PYTHON
"$work/venv/bin/python" "$work/look.py" "$work/saved" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
