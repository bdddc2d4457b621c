#!/usr/bin/env bash
# nn.Module.to("meta") and to_empty() make two parameters of one that is tied; .to(dtype) keeps it one.
#
# Packages:  torch 2.13.0.
# Behaviour: a module's .to() goes through its modules one by one. Where a tensor's new form can take the place of the old
#            one inside of the same Parameter (another dtype, another device with memory of its own), the Parameter stays
#            the object it was, and whoever shares it still does. Where it cannot (to meta, from meta by to_empty, between
#            a plain tensor and one of a subclass that wraps another), every place gets a new Parameter of its own.
#            torch.__future__.set_overwrite_module_params_on_conversion(True) loses ties everywhere;
#            set_swap_module_params_on_conversion(True) keeps them, for to_empty() too.
# Seen:      tied after .to(float16): yes. After .to("meta"): no. Tied on meta, then to_empty(device="cpu"): no, and the
#            two have memory of their own. With set_swap_module_params_on_conversion(True): yes, yes, yes.
# Matters:   a skeleton made on meta, emptied into place and filled by name has two embeddings where the model had one; the
#            one whose name the checkpoint leaves out stays uninitialised, memory and saved files grow by the largest matrix,
#            and no line of it warns. Tie again after every such move, as Transformers' tie_weights() does.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$dir/show.py" <<'EOF'
import sys

import torch
from torch import nn


def tied(place):
    with torch.device(place):
        model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def still(model):
    return model["head"].weight is model["embed"].weight


def seen():
    emptied = tied("meta").to_empty(device="cpu")
    own = emptied["head"].weight.data_ptr() != emptied["embed"].weight.data_ptr()
    return {
        ".to(float16)": still(tied("cpu").to(torch.float16)),
        '.to("meta")': still(tied("cpu").to("meta")),
        "to_empty()": still(emptied),
        "memory of their own after to_empty()": own,
    }


plain = seen()
torch.__future__.set_swap_module_params_on_conversion(True)
swapped = seen()
for name, found in (("as it comes", plain), ("with set_swap_module_params_on_conversion(True)", swapped)):
    print(f"tied, {name}: {found}")
if list(plain.values()) != [True, False, False, True] or list(swapped.values()) != [True, True, True, False]:
    sys.exit("not as described")
EOF
"$dir/venv/bin/python" -I "$dir/show.py"
