#!/usr/bin/env bash
# diffusers: AutoencoderKLHunyuanVideo15 decodes one video at a time only. Its attention's mask is (B, N, N) while queries
# are (B, 1, N, C), so that for B > 1 it does not fit, and HunyuanVideo15Pipeline fails on two prompts after all steps are
# done. HunyuanVideo (1.0), built the same way, decodes two.
#
#     findings/diffusers_hunyuan_video15_batch.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, torch 2.13.0: (1, 3, 5, 16, 16) for one, RuntimeError for two. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat >"$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLHunyuanVideo15

print({name: version(name) for name in ("diffusers", "torch")})
torch.manual_seed(0)
newer = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1)
older = AutoencoderKLHunyuanVideo(
    latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
)
seen = {}
with torch.no_grad():
    for name, vae, side in (("1.5", newer, 1), ("1.0", older, 2)):
        for n in (1, 2):
            try:
                seen[name, n] = tuple(vae.decode(torch.randn(n, 4, 2, side, side)).sample.shape)
            except RuntimeError as error:
                seen[name, n] = f"RuntimeError: {error}"
            print(f"HunyuanVideo {name}, {n} video(s): {seen[name, n]}")
as_stated = str(seen["1.5", 2]).startswith("RuntimeError") and all(
    isinstance(seen[key], tuple) for key in (("1.5", 1), ("1.0", 1), ("1.0", 2))
)
sys.exit(not as_stated)
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
