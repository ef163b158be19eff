#!/usr/bin/env bash
# distillmos: the gradient of the predicted opinion score by a sound is NaN where the sound has digital silence, such as
# zeros before the first word; the score itself is fine. The magnitude of a spectrum of zeros is taken by `** 0.5`, whose
# derivative there is infinite, and clipped afterwards. Noise of 1e-4 beside the sound, 80 dB below full scale, leaves one
# NaN, at the sound's greatest value: the network pads sounds to 7.68 s by zeros and then divides by that value. Padded
# to 7.68 s before the noise is added, all of the gradient is finite.
# Beside a torch without CUDA the package cannot be imported at all: it imports torchaudio, whose wheel of the package
# index needs libc10_cuda.so, for reading files. An empty module in its place will do for the network.
#
#     findings/distillmos_silence.sh     # installs into a temporary folder
#
# Seen with distillmos 0.9.1, xls-r-sqa 0.1.0, torch 2.13.0: NaN in 15,921 of 32,000 values, in 1, and in none. With torch 2.13.0+cpu and
# torchaudio 2.11.1: OSError at `import torchaudio`. Fails where the first changes; says what it finds of the second.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$work/venv/bin/pip" install --quiet --no-deps distillmos==0.9.1 xls-r-sqa==0.1.0 torchaudio==2.11.1
cat >"$work/look.py" <<'PYTHON'
import sys
import types
from importlib.metadata import version

import torch

print({name: version(name) for name in ("distillmos", "xls-r-sqa", "torch", "torchaudio")})
try:
    import torchaudio  # noqa: F401

    print("torchaudio can be imported")
except OSError as error:
    print(f"import torchaudio: {error} ({error.__cause__})")
    for name in [name for name in sys.modules if name.startswith("torchaudio")]:
        del sys.modules[name]
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
from distillmos import ConvTransformerSQAModel

model = ConvTransformerSQAModel().eval()
time = torch.arange(32_000) / 16_000
sound = 0.3 * (2 * torch.pi * 220 * time).sin() * (time > 1)  # a second of silence, a second of a tone
noise = 1e-4 * torch.randn(122_880, generator=torch.Generator().manual_seed(0))
padded = torch.nn.functional.pad(sound, (0, 122_880 - 32_000))
cases = {"with zeros": sound, "with noise of 1e-4": sound + noise[:32_000], "with noise after padding": padded + noise}
finite = []
for name, heard in cases.items():
    heard = heard[None].requires_grad_()
    score = model(heard)
    (gradient,) = torch.autograd.grad(score.sum(), heard)
    finite.append(bool(gradient.isfinite().all()))
    print(f"{name}: score {score.item():.2f}, gradient finite: {finite[-1]}, NaN in {int(gradient.isnan().sum())} values")
sys.exit(finite != [False, False, True])
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "distillmos does otherwise than stated" >&2; exit 1; }
