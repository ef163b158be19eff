#!/usr/bin/env bash
# diffusers: compile_repeated_blocks() compiles the blocks that a transformer repeats, found by the class's own list
# `_repeated_blocks`. SD3Transformer2DModel, with its 24 equal blocks, has no such list: the call raises ValueError, and
# the message asks the user to write the attribute. FluxTransformer2DModel has it.
#
#     findings/diffusers_repeated_blocks_of_sd3.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, torch 2.13.0: ValueError for SD3, 2 classes for FLUX. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat >"$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version

from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

print({name: version(name) for name in ("diffusers", "torch")})
network = SD3Transformer2DModel(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
    pos_embed_max_size=8,
)
kinds = {type(block).__name__ for block in network.transformer_blocks}
try:
    network.compile_repeated_blocks()
    said = ""
except ValueError as error:
    said = str(error)
print(f"SD3 repeats {kinds}, says: {said}")
print(f"FLUX names {FluxTransformer2DModel._repeated_blocks}")
as_stated = kinds == {"JointTransformerBlock"} and "_repeated_blocks" in said
sys.exit(not (as_stated and len(FluxTransformer2DModel._repeated_blocks) == 2))
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
