#!/usr/bin/env bash
# A step of a fused optimizer changes a parameter but not its version counter.
#
# Packages:  torch 2.13.0 (CPU).
# Behaviour: Tensor._version goes up with every in-place change, and so with a step of SGD, Adagrad or AdamW, looped or
#            foreach. With fused=True it stays where it was. So it does with module.half(), whose parameter is also the
#            same object as before, and with vector_to_parameters.
# Seen:      SGD {} 1, foreach 1, fused 0 | Adagrad {} 1, foreach 1, fused 0 | AdamW {} 2, foreach 2, fused 0
#            half(): same object True, version +0, dtype torch.float16 | vector_to_parameters: +0
# Matters:   a cache of unpacked or repacked weights keyed on (id, _version) serves old weights after such a step.
#            Compare data_ptr and dtype for .half(), and drop the cache by hand after an optimizer's step.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$dir/show.py" <<'EOF'
import sys

import torch
from torch import nn
from torch.nn.utils import vector_to_parameters

seen = {}


def step(optimizer: type, **options: bool) -> int:
    parameter = nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    before = parameter._version
    optimizer([parameter], lr=0.1, **options).step()
    assert bool((parameter < 1).all()), "the step changed nothing"
    return parameter._version - before


for optimizer in (torch.optim.SGD, torch.optim.Adagrad, torch.optim.AdamW):
    seen[optimizer.__name__] = [step(optimizer, **options) for options in ({}, {"foreach": True}, {"fused": True})]

linear = nn.Linear(2, 2)
weight, before = linear.weight, linear.weight._version
linear.half()
seen["half()"] = [linear.weight is weight, weight._version - before, weight.dtype]

parameter = nn.Parameter(torch.ones(4))
vector_to_parameters(torch.zeros(4), [parameter])
seen["vector_to_parameters"] = [parameter._version, parameter.sum().item()]

for name, each in seen.items():
    print(f"{name}: {each}")
expected = [[1, 1, 0], [1, 1, 0], [2, 2, 0], [True, 0, torch.float16], [0, 0.0]]
if list(seen.values()) != expected:
    sys.exit("not as described")
EOF
"$dir/venv/bin/python" -I "$dir/show.py"
