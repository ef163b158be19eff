#!/usr/bin/env bash
# torch: `module.compile()` on a layer or container of torch's own (Linear, Sequential, LayerNorm, TransformerEncoderLayer)
# compiles nothing and says nothing, where `torch.compile(module)` compiles it: a network that is compiled block by block
# stays as it was wherever a block is one of these. A module of one's own around the same layers is compiled by either.
# (With fullgraph=True torch 2.13 says so in an error, 2.6 does not.)
#
#     findings/torch_compile_of_own_layers.sh     # installs into a temporary folder
#
# Seen with torch 2.13.0 and 2.6.0 on a CPU: 0 graphs by `.compile()`, 1 by `torch.compile`. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat >"$work/look.py" <<'PYTHON'
import sys

import torch
from torch import nn

graphs = []


def counted(graph, inputs):
    graphs.append(graph)
    return graph.forward


class Own(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def compiled(module, way):
    torch._dynamo.reset()
    graphs.clear()
    if way == ".compile()":
        module.compile(backend=counted)
    else:
        module = torch.compile(module, backend=counted)
    with torch.no_grad():
        module(torch.ones(2, 3, 8))
    return len(graphs)


kinds = {
    "Linear": lambda: nn.Linear(8, 8),
    "Sequential": lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()),
    "LayerNorm": lambda: nn.LayerNorm(8),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(8, 2),
    "a module of one's own": lambda: Own(nn.Linear(8, 8)),
}
print("torch", torch.__version__)
found = {}
for name, make in kinds.items():
    found[name] = [compiled(make(), way) for way in (".compile()", "torch.compile")]
    print(f"{name}: {found[name][0]} graphs by .compile(), {found[name][1]} by torch.compile")
own = found.pop("a module of one's own")
sys.exit(own != [1, 1] or any(by_method or by_function != 1 for by_method, by_function in found.values()))
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "torch does otherwise than stated" >&2; exit 1; }
