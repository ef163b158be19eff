#!/usr/bin/env bash
# torch: a backend in Python (PrivateUse1, torch.utils.backend_registration) whose one kernel is a fallback for all
# operations makes tensors (torch.zeros), computes and differentiates, but torch.tensor([...], device=...) ends in an
# internal assertion ("func != nullptr"), and torch.arange(4, device=...) gives a tensor of shape [0]: the one asks for
# its memory and its copy while Python is left out of the dispatch, the other resizes an empty tensor, of which a
# subclass that wraps another does not learn. The first needs kernels of empty_strided and _copy_from by their names.
#
#     findings/torch_python_backend_fallback.sh     # installs into a temporary folder
#
# Seen with torch 2.13.0 on a CPU: "zeros far:0 (2,)", "arange (0,)", "tensor RuntimeError func != nullptr INTERNAL
# ASSERT FAILED". Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat >"$work/look.py" <<'PYTHON'
import sys

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_map_only

backend_registration._setup_privateuseone_for_python_backend("far")


class Far(torch.Tensor):
    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device="far:0"
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, *args, **(kwargs or {}))


def run(func, *args, **kwargs):
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    args, kwargs = tree_map_only(Far, lambda tensor: tensor.held, (args, kwargs))
    return tree_map_only(torch.Tensor, Far, func(*args, **kwargs))


library = torch.library.Library("_", "IMPL")
library.fallback(run, "PrivateUse1")
zeros, counted = torch.zeros(2, device="far"), torch.arange(4, device="far")
print(torch.__version__, "zeros", zeros.device, tuple(zeros.shape))
print("arange", tuple(counted.shape))
try:
    given = torch.tensor([1.0, 2.0], device="far")
except RuntimeError as error:
    said = str(error).split("FAILED")[0] + "FAILED"
    print("tensor RuntimeError", said)
else:
    sys.exit("torch.tensor works now")
is_as_stated = zeros.shape == (2,) and counted.shape == (0,) and said == "func != nullptr INTERNAL ASSERT FAILED"
sys.exit(not is_as_stated)
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "torch does otherwise than stated" >&2; exit 1; }
