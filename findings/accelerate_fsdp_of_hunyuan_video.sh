#!/usr/bin/env bash
# accelerate: FSDP version 2 that wraps the classes of blocks which a model names (TRANSFORMER_BASED_WRAP) raises ValueError
# for diffusers' HunyuanVideoTransformer3DModel of text to video: its `_no_split_modules` also names blocks that only the
# form which begins with a picture has, and accelerate asks for every one of them.
#
#     findings/accelerate_fsdp_of_hunyuan_video.sh     # installs into a temporary folder
#
# Seen with accelerate 1.15.0, diffusers 0.42.1: "Could not find the transformer layer class
# HunyuanVideoTokenReplaceTransformerBlock in the model". Naming the classes that are there works:
# fsdp_transformer_layer_cls_to_wrap. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet accelerate==1.15.0 diffusers==0.42.1 torch==2.13.0 transformers==5.23.0
cat >"$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version

from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from diffusers import HunyuanVideoTransformer3DModel

print({name: version(name) for name in ("accelerate", "diffusers", "torch")})
network = HunyuanVideoTransformer3DModel(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=1,
    num_refiner_layers=1, text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(4, 4, 4),
)
print("named", network._no_split_modules)
there = sorted({type(module).__name__ for module in network.modules()} & set(network._no_split_modules))
print("there", there)


def blocks(names):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=names
    )
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, network)
    return sum(map(wraps, network.modules()))


try:
    told = f"{blocks(None)} blocks"
except ValueError as error:
    told = f"ValueError: {error}"
print("as the model names them:", told)
print("those that are there:", blocks(there), "blocks")
sys.exit(not (told.startswith("ValueError: Could not find the transformer layer class HunyuanVideoToken") and blocks(there)))
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "accelerate or diffusers does otherwise than stated" >&2; exit 1; }
