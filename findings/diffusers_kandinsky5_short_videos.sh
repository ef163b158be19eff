#!/usr/bin/env bash
# diffusers: Kandinsky5I2VPipeline gives NaN for videos of up to 13 frames, and an AttributeError for one. Once latents are
# drawn, its call brings mean and deviation of the first four latent frames nearer to those of the frames after them
# (`normalize_first_frame`), of which such a video has none; for a single frame that gives a tuple in the place of latents.
#
#     findings/diffusers_kandinsky5_short_videos.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1: 5 and 13 frames end as NaN (torch warns of std()), 17 do not. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat >"$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5Transformer3DModel,
)

print({name: version(name) for name in ("diffusers", "torch")})
torch.manual_seed(0)
network = Kandinsky5Transformer3DModel(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=16, model_dim=32, ff_dim=48,
    num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6), visual_cond=True,
)
vae = AutoencoderKLHunyuanVideo(
    latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2,
    mid_block_add_attention=False,
)
pipeline = Kandinsky5I2VPipeline(network, vae, None, None, None, None, FlowMatchEulerDiscreteScheduler())
pipeline.set_progress_bar_config(disable=True)
text = {
    "prompt_embeds_qwen": torch.randn(1, 6, 8),
    "prompt_embeds_clip": torch.randn(1, 8),
    "prompt_cu_seqlens": torch.tensor([0, 6], dtype=torch.int32),
}
seen = {}
for frames in (1, 5, 13, 17):
    try:
        video = pipeline(
            torch.rand(1, 3, 32, 32), height=32, width=32, num_frames=frames, num_inference_steps=2, guidance_scale=1.0,
            output_type="pt", **text,
        ).frames
        seen[frames] = "NaN" if video.isnan().any() else "finite"
    except Exception as error:
        seen[frames] = f"{type(error).__name__}: {error}"
    print(f"{frames} frames: {seen[frames]}")
sys.exit(not (seen[1].startswith("AttributeError") and seen[5] == seen[13] == "NaN" and seen[17] == "finite"))
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
