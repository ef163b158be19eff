#!/usr/bin/env bash
# diffusers: offline, load_lora_weights does not take a local folder. With HF_HUB_OFFLINE=1 (or local_files_only=True)
# it raises "When using the offline mode, you must specify a `weight_name`" for a folder on this disk that holds one
# file, by the usual name; with weight_name it loads it. So in 0.39.0; 0.40.0 looks into the folder.
#
#     findings/diffusers_lora_offline.sh     # installs into a temporary folder
#
# Seen with diffusers 0.39.0 and 0.40.0, torch 2.13.0, peft 0.21.2. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
cat >"$work/look.py" <<'PYTHON'
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from diffusers import SD3Transformer2DModel, __version__
from peft import LoraConfig

sizes = {"sample_size": 4, "patch_size": 2, "in_channels": 4, "num_layers": 1, "attention_head_dim": 4, "out_channels": 4}
sizes |= {"num_attention_heads": 2, "joint_attention_dim": 8, "caption_projection_dim": 8, "pooled_projection_dim": 8}
network = SD3Transformer2DModel(**sizes)
network.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
network.save_lora_adapter("lora")
print(__version__, os.listdir("lora"))
found = {}
for name, given in (("folder", {}), ("folder and file", {"weight_name": "pytorch_lora_weights.safetensors"})):
    other = SD3Transformer2DModel(**sizes)
    try:
        other.load_lora_adapter("lora", prefix=None, use_safetensors=True, **given)
        found[name] = "loads"
    except ValueError as error:
        found[name] = str(error)
print(found)
offline = "When using the offline mode, you must specify a `weight_name`."
sys.exit(found != {"folder": offline if __version__ == "0.39.0" else "loads", "folder and file": "loads"})
PYTHON
cd "$work"
for version in 0.39.0 0.40.0; do
    "$work/venv/bin/pip" install --quiet \
        "diffusers==$version" torch==2.13.0 peft==0.21.2 accelerate==1.15.0 transformers==5.23.0 safetensors==0.8.0
    rm -rf lora
    "$work/venv/bin/python" look.py || { echo "diffusers $version does otherwise than stated" >&2; exit 1; }
done
