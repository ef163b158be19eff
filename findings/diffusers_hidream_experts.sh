#!/usr/bin/env bash
# diffusers: HiDreamImageTransformer2DModel in evaluation mode computes its routed experts under torch.no_grad(), also
# where gradients are asked for: those that go through an expert are left out without a word, those of the experts' own
# weights are None. from_pretrained gives a network in evaluation mode, and in training mode it gives patches instead of
# latents, so that whoever trains by its output as a pipeline uses it gets gradients that are not those of the output.
#
#     findings/diffusers_hidream_experts.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, torch 2.13.0: the output depends on an expert's weight, its gradient is None; in training
# mode it has one, and the output's shape is another. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat >"$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from diffusers import HiDreamImageTransformer2DModel

print({name: version(name) for name in ("diffusers", "torch")})
torch.manual_seed(0)
network = HiDreamImageTransformer2DModel(
    patch_size=2, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    caption_channels=(8, 8), text_emb_dim=8, num_routed_experts=2, num_activated_experts=2, axes_dims_rope=(4, 6, 6),
    max_resolution=(8, 8), llama_layers=(0, 1),
)
given = {
    "hidden_states": torch.randn(1, 4, 8, 8), "timesteps": torch.tensor([500.0]),
    "encoder_hidden_states_t5": torch.randn(1, 3, 8), "encoder_hidden_states_llama3": torch.randn(2, 1, 3, 8),
    "pooled_embeds": torch.randn(1, 8), "return_dict": False,
}
weight = network.double_stream_blocks[0].block.ff_i.experts[0].w2.weight
found = {}
for mode in ("evaluation", "training"):
    network.train(mode == "training")
    network.zero_grad()
    output = network(**given)[0]
    output.square().sum().backward()
    with torch.no_grad():
        weight.mul_(2)
        change = (network(**given)[0] - output).abs().max().item()
        weight.div_(2)
    found[mode] = weight.grad is None
    print(f"{mode}: output {tuple(output.shape)}, changes by {change:.1e} with the weight, gradient is None: {found[mode]}")
    found[f"{mode} depends"] = change > 1e-6
as_stated = found["evaluation"] and not found["training"] and found["evaluation depends"]
sys.exit(not as_stated)
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
