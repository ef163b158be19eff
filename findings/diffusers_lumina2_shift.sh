#!/usr/bin/env bash
# diffusers: Lumina2Pipeline shifts its schedule by the number of channels of the latents, where it means the number of
# image tokens: `image_seq_len = latents.shape[1]`, and latents are (batch, channels, height, width) there. With a
# scheduler that says use_dynamic_shifting the noise levels are therefore the same at every resolution; by the tokens,
# as FluxPipeline counts them, they would differ.
#
#     findings/diffusers_lumina2_shift.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, torch 2.13.0: the same levels at 64 and at 256 pixels, those of a "sequence" of 4 channels.
# Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat >"$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from diffusers.pipelines.lumina2.pipeline_lumina2 import calculate_shift

print({name: version(name) for name in ("diffusers", "torch")})
levels = (8, 8, 8, 8)
pipeline = Lumina2Pipeline(
    transformer=Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 6, 6), axes_lens=(64, 32, 32), cap_feat_dim=8,
    ),
    vae=AutoencoderKL(
        block_out_channels=levels, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4,
    ),
    scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), text_encoder=None, tokenizer=None,
)
pipeline.set_progress_bar_config(disable=True)


def levels_of(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4), mu=shift)
    return scheduler.sigmas


drawn = {}
for side in (64, 256):
    pipeline(
        prompt_embeds=torch.zeros(1, 4, 8), prompt_attention_mask=torch.ones(1, 4, dtype=torch.long), height=side,
        width=side, num_inference_steps=4, guidance_scale=1.0, output_type="latent",
    )
    drawn[side] = pipeline.scheduler.sigmas
    tokens = (side // 16) ** 2
    print(f"{side} pixels, {tokens} tokens: {drawn[side].tolist()}; by tokens {levels_of(calculate_shift(tokens)).tolist()}")
same = torch.equal(drawn[64], drawn[256]) and torch.allclose(drawn[64], levels_of(calculate_shift(4)))
sys.exit(not (same and not torch.allclose(drawn[256], levels_of(calculate_shift(256)))))
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
