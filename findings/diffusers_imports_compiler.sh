#!/usr/bin/env bash
# diffusers: to import one class of models brings in torch's compiler and, where peft and bitsandbytes are installed, the
# code generator of Inductor and transformers' models as well, although nothing is compiled, quantised or adapted: three
# times the CPU time of importing torch. diffusers.utils.torch_utils imports torch._dynamo for a decorator;
# diffusers.hooks.layerwise_casting imports peft, peft transformers and bitsandbytes, and that torch._inductor.
#
#     findings/diffusers_imports_compiler.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, peft 0.21.2, bitsandbytes 0.50.2, torch 2.13.0 on a CPU: 2.0 and 6.8 s. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet \
    diffusers==0.42.1 torch==2.13.0 peft==0.21.2 accelerate==1.15.0 transformers==5.23.0 bitsandbytes==0.50.2
cat >"$work/look.py" <<'PYTHON'
import sys
import time
from importlib.metadata import version

print({name: version(name) for name in ("diffusers", "peft", "bitsandbytes", "torch")})
began = time.process_time()
import torch

torch_alone = time.process_time() - began
names = ("torch._dynamo", "torch._inductor.lowering", "peft", "bitsandbytes", "transformers.modeling_utils")
before = [name for name in names if name in sys.modules]
began = time.process_time()
from diffusers import AutoencoderKL

print(f"torch {torch_alone:.1f} s of CPU time, AutoencoderKL of diffusers {time.process_time() - began:.1f} s more")
after = [name for name in names if name in sys.modules]
print(f"imported by torch: {before}, by AutoencoderKL: {after}")
sys.exit(bool(before) or after != list(names))
PYTHON
"$work/venv/bin/python" -c "from diffusers import AutoencoderKL" # writes bytecode
"$work/venv/bin/python" "$work/look.py" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
