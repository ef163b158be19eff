#!/usr/bin/env bash
# diffusers: set_attention_backend(name) is a method of every network, and its documentation names no network that it does
# not work for. The attention of SD3Transformer2DModel never asks for the backend: the call returns, and every pass is
# computed as before. With a backend of one's own that gives zeros, SD3 gives the same numbers as without, FLUX others.
# What does change is the choice of every other network of the process that was given none: the backend becomes the
# global one, too, and reset_attention_backend() does not take that back.
#
#     findings/diffusers_attention_backend_of_sd3.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, torch 2.13.0: "SD3 changed False, FLUX changed True, another FLUX changed True, after reset
# True". Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat >"$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

print({name: version(name) for name in ("diffusers", "torch")})
torch.manual_seed(0)
sd3 = SD3Transformer2DModel(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
    pos_embed_max_size=8,
)
flux, other = (
    FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    )
    for _ in range(2)
)
tokens, pooled, t = torch.randn(1, 5, 32), torch.randn(1, 32), torch.tensor([0.5])


def velocity(network):
    common = {"timestep": t, "encoder_hidden_states": tokens, "pooled_projections": pooled, "return_dict": False}
    if network is not sd3:
        image = {"hidden_states": torch.ones(1, 16, 4), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    else:
        image = {"hidden_states": torch.ones(1, 4, 8, 8)}
    with torch.no_grad():
        return network(**image, **common)[0]


def zeros(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
          return_lse=False, _parallel_config=None):
    return torch.zeros_like(query)


before = {network: velocity(network) for network in (sd3, flux, other)}
backend = AttentionBackendName._NATIVE_MATH
_AttentionBackendRegistry._backends[backend] = zeros
sd3.set_attention_backend(backend.value)
alone = not torch.equal(velocity(sd3), before[sd3])
spread = not torch.equal(velocity(other), before[other])
flux.set_attention_backend(backend.value)
changed = not torch.equal(velocity(flux), before[flux])
for network in (sd3, flux):
    network.reset_attention_backend()
still = not torch.equal(velocity(flux), before[flux])
print(f"SD3 changed {alone}, FLUX changed {changed}, another FLUX changed {spread}, after reset {still}")
sys.exit((alone, changed, spread, still) != (False, True, True, True))
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
