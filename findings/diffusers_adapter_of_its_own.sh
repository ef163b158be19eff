#!/usr/bin/env bash
# diffusers: a network does not find the adapter that it has saved itself. save_lora_adapter(folder) writes
# pytorch_lora_weights.safetensors, load_lora_adapter(folder) looks for pytorch_lora_weights.bin and raises OSError; with
# use_safetensors=True it reads the file, and drops all of its weights, as it wants names that begin in "transformer." and
# those that were saved do not. Only prefix=None besides brings the adapter back.
#
#     findings/diffusers_adapter_of_its_own.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, peft 0.21.2, torch 2.13.0: OSError, no adapter, an adapter. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet \
    diffusers==0.42.1 torch==2.13.0 peft==0.21.2 accelerate==1.15.0 transformers==5.23.0 safetensors==0.8.0
cat >"$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from diffusers import OvisImageTransformer2DModel
from peft import LoraConfig

print({name: version(name) for name in ("diffusers", "peft", "torch")})


def network():
    torch.manual_seed(0)
    return OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )


trained = network()
trained.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
trained.save_lora_adapter(sys.argv[1])


def loaded(**settings):
    other = network()
    try:
        other.load_lora_adapter(sys.argv[1], **settings)
    except OSError as error:
        return f"OSError: {str(error)[:60]}"
    return f"{sum('lora_A' in name for name, _ in other.named_parameters())} adapted layers"


found = [loaded(), loaded(use_safetensors=True), loaded(use_safetensors=True, prefix=None)]
print("\n".join(found))
as_stated = found[0].startswith("OSError") and found[1] == "0 adapted layers" and found[2] == "2 adapted layers"
sys.exit(not as_stated)
PYTHON
"$work/venv/bin/python" "$work/look.py" "$work/saved" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
