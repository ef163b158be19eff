#!/usr/bin/env bash
# speechmos: the package says that it requires nothing, and imports numpy, librosa, onnxruntime and requests: installed by
# itself it cannot be imported. Whoever requires it must require those, too.
#
#     findings/speechmos_requirements.sh     # installs into a temporary folder
#
# Seen with speechmos 0.0.1.1: no Requires-Dist; ModuleNotFoundError: No module named 'librosa'. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet speechmos==0.0.1.1
"$work/venv/bin/python" - <<'PYTHON' || { echo "speechmos does otherwise than stated" >&2; exit 1; }
import sys
from importlib.metadata import requires, version

print("speechmos", version("speechmos"), "requires", requires("speechmos"))
try:
    from speechmos import dnsmos  # noqa: F401
except ModuleNotFoundError as error:
    print(f"from speechmos import dnsmos: {error}")
else:
    sys.exit("it can be imported")
sys.exit(1 if requires("speechmos") else 0)
PYTHON
