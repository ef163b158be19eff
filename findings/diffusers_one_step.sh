#!/usr/bin/env bash
# diffusers: two flow schedules cannot be followed in one step. With shift_terminal, which LTX-Video and Qwen-Image set,
# FlowMatchEulerDiscreteScheduler divides 0 by 0: its only noise level is nan, and step() raises IndexError, as it does
# not find its own timestep. Mochi's linear_quadratic_schedule raises ZeroDivisionError. Two steps are fine.
#
#     findings/diffusers_one_step.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, torch 2.13.0. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet \
    diffusers==0.42.1 torch==2.13.0 accelerate==1.15.0 transformers==5.23.0 safetensors==0.8.0
cat >"$work/look.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

print({name: version(name) for name in ("diffusers", "torch")})
warnings.simplefilter("ignore")  # numpy's, of the division
found = []
for steps in (1, 2):
    scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=0.02)
    scheduler.set_timesteps(steps)
    levels = scheduler.sigmas.tolist()
    try:
        scheduler.step(torch.ones(2), scheduler.timesteps[0], torch.ones(2))
        stepped = "steps"
    except IndexError:
        stepped = "IndexError"
    try:
        quadratic = str(len(linear_quadratic_schedule(steps, 0.025)))
    except ZeroDivisionError:
        quadratic = "ZeroDivisionError"
    found.append((levels[0] != levels[0], stepped, quadratic))
    print(steps, [round(level, 3) for level in levels], stepped, quadratic)
sys.exit(found != [(True, "IndexError", "ZeroDivisionError"), (False, "steps", "2")])
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
