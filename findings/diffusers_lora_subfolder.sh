#!/usr/bin/env bash
# diffusers: pipe.load_lora_weights(FOLDER, subfolder="second") of a local folder reads FOLDER's own file where there is
# one of that name, and says nothing: the subfolder counts only where the folder itself has no such file. On the hub the
# subfolder is taken. WanPipeline has two networks to load adapters into, so two such files are what one would save.
#
#     findings/diffusers_lora_subfolder.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, peft 0.21.2, torch 2.13.0: the second network got the first one's adapter. Fails where that
# changes.
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
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

print({name: version(name) for name in ("diffusers", "peft", "torch")})
folder = sys.argv[1]


def network():
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=32,
        num_layers=1, rope_max_seq_len=32,
    )


def factor(model):
    return dict(model.named_parameters())["blocks.0.attn1.to_q.lora_B.default_0.weight"]


for value, place in ((1.0, folder), (2.0, f"{folder}/transformer_2")):
    trained = network()
    trained.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    state = {key: torch.full_like(weight, value) for key, weight in get_peft_model_state_dict(trained).items()}
    WanPipeline.save_lora_weights(place, transformer_lora_layers=state)

pipe = WanPipeline(
    tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=network(), transformer_2=network()
)
pipe.load_lora_weights(folder, subfolder="transformer_2", load_into_transformer_2=True)
inside = factor(pipe.transformer_2)
print(f"saved: 1 in the folder, 2 in its subfolder; loaded with subfolder='transformer_2': {inside.unique().tolist()}")
sys.exit(inside.unique().tolist() != [1.0])
PYTHON
"$work/venv/bin/python" "$work/look.py" "$work/lora" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
