#!/usr/bin/env bash
# Under activation checkpointing most forward hooks run twice and the last ones once.
#
# Packages:  torch 2.13.0.
# Behaviour: torch.utils.checkpoint runs the function again in backward, hooks included. With use_reentrant=False it
#            stops inside the module that saves the last tensor a gradient needs: that module's forward hooks, and
#            everything after it, run once; its pre-hooks run twice. use_reentrant=True runs all of them twice.
# Seen:      calls of the hooks of [linear, relu, linear, identity] in one step
#            no checkpoint: [1, 1, 1, 1]    use_reentrant=True: [2, 2, 2, 2]    use_reentrant=False: [2, 2, 1, 1]
#            pre-hooks, use_reentrant=False: [2, 2, 2, 1]
# Matters:   hooks that add up X^T X, count tokens or record scales while a model with gradient checkpointing is
#            tuned count some layers twice and others once; no constant factor mends it.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$dir/show.py" <<'EOF'
import sys

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def counts(reentrant: bool | None, before: bool = False) -> list[int]:
    block = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Identity())
    seen = [0, 0, 0, 0]
    for index, module in enumerate(block):

        def count(*_, index=index):
            seen[index] += 1

        (module.register_forward_pre_hook if before else module.register_forward_hook)(count)
    x = torch.ones(1, 2, requires_grad=True)
    y = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
    y.sum().backward()
    return seen


seen = [counts(None), counts(True), counts(False), counts(False, before=True)]
for name, each in zip(("no checkpoint", "use_reentrant=True", "use_reentrant=False", "pre-hooks, False"), seen):
    print(f"{name}: {each}")
if seen != [[1, 1, 1, 1], [2, 2, 2, 2], [2, 2, 1, 1], [2, 2, 2, 1]]:
    sys.exit("not as described")
EOF
"$dir/venv/bin/python" -I "$dir/show.py"
