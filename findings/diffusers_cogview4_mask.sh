#!/usr/bin/env bash
# diffusers: the attention_mask of CogView4Transformer2DModel does not mask. Its attention makes a matrix of 0 and 1 of
# it and hands that, as a float, to scaled_dot_product_attention, which adds it to the logits: tokens that are left out
# get 0, the others 1. What stands in masked places still changes the image.
#
#     findings/diffusers_cogview4_mask.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, torch 2.13.0: other embeddings in masked places change the output. Fails where that
# changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat >"$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from diffusers import CogView4Transformer2DModel

print({name: version(name) for name in ("diffusers", "torch")})
torch.manual_seed(0)
network = CogView4Transformer2DModel(
    in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, text_embed_dim=8,
    time_embed_dim=16, condition_dim=8, sample_size=8, rope_axes_dim=(16, 16),
).eval()
x, size, mask = torch.randn(1, 4, 8, 8), torch.tensor([[64.0, 64.0]]), torch.tensor([[1, 1, 1, 0, 0, 0]])
first = torch.randn(1, 6, 8)
second = torch.where(mask[..., None] > 0, first, 3 * torch.randn(1, 6, 8))
outputs = []
with torch.no_grad():
    for embeds in (first, second):
        outputs.append(
            network(
                x, embeds, torch.tensor([500.0]), size, size, torch.zeros_like(size), attention_mask=mask,
                return_dict=False,
            )[0]
        )
change = (outputs[0] - outputs[1]).abs().max().item()
print(f"other embeddings in masked places change the output by {change:.1e}, of {outputs[0].abs().max().item():.1e}")
sys.exit(not change > 1e-4)
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
