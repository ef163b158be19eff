#!/usr/bin/env bash
# diffusers: SanaVideoPipeline refuses most of the sizes that it chooses itself. Its call brings height and width to one of
# its own list (`use_resolution_binning`, on by default), then wants multiples of 32; in the list of networks for 480
# pixels seven of eleven are multiples of 16 only. A square video, say, cannot be asked for.
#
#     findings/diffusers_sana_video_sizes.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1: 624 x 624 and six others end in a ValueError, 480 x 832 does not. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat >"$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version

from diffusers import FlowMatchEulerDiscreteScheduler, SanaVideoPipeline, SanaVideoTransformer3DModel
from diffusers.pipelines.sana_video.pipeline_sana_video import ASPECT_RATIO_480_BIN

print({name: version(name) for name in ("diffusers", "torch")})
network = SanaVideoTransformer3DModel(
    num_attention_heads=1, attention_head_dim=12, num_layers=1, num_cross_attention_heads=1,
    cross_attention_head_dim=12, cross_attention_dim=12, caption_channels=8, sample_size=30,
)
pipeline = SanaVideoPipeline(None, None, None, network, FlowMatchEulerDiscreteScheduler())
seen = {}
for height, width in ASPECT_RATIO_480_BIN.values():
    height, width = int(height), int(width)
    try:
        pipeline("a cat", height=height, width=width)
    except ValueError as error:
        seen[height, width] = str(error)
    except Exception:  # it has no text encoder here: sizes were taken
        seen[height, width] = "taken"
    print(f"{height} x {width}: {seen[height, width]}")
refused = [size for size, found in seen.items() if "divisible by 32" in found]
sys.exit(not (len(refused) == 7 and (624, 624) in refused and seen[480, 832] == "taken"))
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
