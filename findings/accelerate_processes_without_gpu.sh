#!/usr/bin/env bash
# accelerate: processes that torchrun starts on a machine without a GPU are not joined unless cpu=True is said. Each gets
# `Accelerator().num_processes == 1` and `is_main_process`, without a warning or an error: two whole trainings, of which
# each writes the same files. `accelerate launch --cpu --num_processes 2` starts one process, and says nothing of that.
#
#     findings/accelerate_processes_without_gpu.sh     # installs into a temporary folder
#
# Seen with accelerate 1.15.0, torch 2.13.0 where no GPU is. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet accelerate==1.15.0 torch==2.13.0
cat >"$work/look.py" <<'PYTHON'
import os
import sys

from accelerate import Accelerator

accelerator = Accelerator(cpu="cpu" in sys.argv)
print(f"WORLD_SIZE {os.environ.get('WORLD_SIZE')}: {accelerator.num_processes} on {accelerator.device.type}", flush=True)
PYTHON
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HOME="$work"
plain=$("$work/venv/bin/torchrun" --nproc-per-node 2 "$work/look.py")
on_cpu=$("$work/venv/bin/torchrun" --nproc-per-node 2 "$work/look.py" cpu)
launched=$("$work/venv/bin/accelerate" launch --cpu --num_processes 2 "$work/look.py" 2>"$work/said")
printf 'torchrun:\n%s\ntorchrun, cpu=True:\n%s\naccelerate launch --cpu --num_processes 2:\n%s\n' "$plain" "$on_cpu" "$launched"
cat "$work/said"
one="WORLD_SIZE 2: 1 on cpu" both="WORLD_SIZE 2: 2 on cpu"
[ "$plain" = "$one"$'\n'"$one" ] && [ "$on_cpu" = "$both"$'\n'"$both" ] && [ "$(grep -c . <<<"$launched")" = 1 ] ||
    { echo "accelerate does otherwise than stated" >&2; exit 1; }
