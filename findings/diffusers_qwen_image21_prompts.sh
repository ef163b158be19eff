#!/usr/bin/env bash
# diffusers: what QwenImage21Pipeline draws of a prompt depends on the other prompts of the call. Its encode_prompt pads
# all to the longest; the network's attention leaves the padding out, but its rotary embedding counts it: the image's
# place on the first axis is where the padded prompt ends. Of the same noise another image comes.
#
#     findings/diffusers_qwen_image21_prompts.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, torch 2.13.0: of random weights the output changes by 0.2 to 0.5 % of its largest value, without
# rotary embedding by none. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat >"$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from diffusers import QwenImage21Transformer2DModel

print({name: version(name) for name in ("diffusers", "torch")})
torch.manual_seed(0)
network = QwenImage21Transformer2DModel(
    in_channels=8, out_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=8,
    axes_dims_rope=(4, 6, 6),
).eval()
x, embeds, slots = torch.randn(1, 16, 8), torch.randn(1, 6, 8), 4


def drawn(padding: int) -> torch.Tensor:
    """What the network gives, as the pipeline calls it for a prompt beside one that has as many tokens more."""
    padded = torch.cat([embeds, torch.zeros(1, padding, 8)], dim=1)
    there = torch.cat([torch.ones(1, 6), torch.zeros(1, padding)], dim=1) if padding else None
    return network(
        hidden_states=x, timestep=torch.tensor([0.5]), encoder_hidden_states=padded, encoder_hidden_states_mask=there,
        img_shapes=[[(1, 4, 4)]], img_mask=torch.arange(6 + padding + slots)[None] >= 6 + padding, return_dict=False,
    )[0][:, -16:]


with torch.no_grad():
    alone = drawn(0)
    changes = {padding: (drawn(padding) - alone).abs().max().item() for padding in (1, 10, 100)}
    network.pos_embed.forward = lambda *given, **named: torch.ones(1, dtype=torch.complex64)
    without = (drawn(10) - drawn(0)).abs().max().item()
for padding, change in changes.items():
    print(f"{padding} tokens of padding change the output by {change:.1e}, of {alone.abs().max().item():.1e}")
print(f"without rotary embedding, 10 change it by {without:.1e}")
sys.exit(not (min(changes.values()) > 1e-3 and without < 1e-5))
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
