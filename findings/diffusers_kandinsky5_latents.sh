#!/usr/bin/env bash
# diffusers: Kandinsky5T2VPipeline writes its steps into the `latents` that it is given. When they have the transformer's
# type and device, the tensor of the caller is the video's latents after the call: the same noise cannot be used again.
# Kandinsky5T2IPipeline of the same release leaves them as they were.
#
#     findings/diffusers_kandinsky5_latents.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, torch 2.13.0: after the call `latents` are changed, and equal to what it returns. Fails
# where that changes.
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
    FlowMatchEulerDiscreteScheduler, Kandinsky5T2IPipeline, Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel,
)

print({name: version(name) for name in ("diffusers", "torch")})
torch.manual_seed(0)
transformer = Kandinsky5Transformer3DModel(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=16, model_dim=32, ff_dim=48,
    num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6),
).eval()
embeds = {
    "prompt_embeds_qwen": torch.randn(1, 3, 8), "prompt_embeds_clip": torch.randn(1, 8),
    "prompt_cu_seqlens": torch.tensor([0, 3], dtype=torch.int32),
}
parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
changed, returned = {}, {}
for kind, more in ((Kandinsky5T2VPipeline, {"num_frames": 5}), (Kandinsky5T2IPipeline, {})):
    pipeline = kind(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    pipeline.resolutions = [(32, 32)]
    pipeline.set_progress_bar_config(disable=True)
    given = torch.randn(1, 2 if more else 1, 4, 4, 4)
    before = given.clone()
    result = pipeline(
        height=32, width=32, num_inference_steps=2, guidance_scale=1.0, latents=given, output_type="latent",
        return_dict=False, **embeds, **more,
    )[0]
    changed[kind.__name__] = (given - before).abs().max().item()
    returned[kind.__name__] = torch.equal(given.flatten(), result.flatten())
print("change of the latents that were given:", changed)
print("they are what the call returned:", returned)
sys.exit(not (changed["Kandinsky5T2VPipeline"] > 1e-3 and returned["Kandinsky5T2VPipeline"]
              and changed["Kandinsky5T2IPipeline"] == 0))
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
