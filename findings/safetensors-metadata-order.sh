#!/usr/bin/env bash
# Two runs of the same program write two different safetensors files, if the metadata has more than one key.
#
# Packages:  safetensors 0.8.0, torch 2.13.0, numpy 2.4.6.
# Behaviour: the entries of `metadata` are written in the order of a hash table that is seeded anew, so the header's
#            bytes change from one save to the next with nothing changed. Tensors have a fixed order, though not the one
#            they were given in: larger dtypes first, then by name.
# Seen:      8 saves with four metadata keys: 5 to 8 different SHA-256; with one key: 1
#            tensors given as z (float32), a (float32), m (uint8), w (int64) are stored as w, a, z, m
# Matters:   a checksum does not tell whether a packed checkpoint is reproducible, and a hub or cache that addresses
#            files by content stores it again. Put everything into one JSON string under one key, or hash the tensors.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 safetensors==0.8.0 numpy==2.4.6 packaging==26.3

cat > "$dir/show.py" <<'EOF'
import hashlib
import json
import sys

import torch
from safetensors.torch import save

tensors = {
    "z": torch.ones(2),
    "a": torch.ones(2),
    "m": torch.ones(2, dtype=torch.uint8),
    "w": torch.ones(2, dtype=torch.int64),
}


def different(keys: int) -> int:
    metadata = {f"key{i}": "value" for i in range(keys)}
    return len({hashlib.sha256(save(tensors, metadata=metadata)).hexdigest() for _ in range(8)})


many, one = different(4), different(1)
print(f"different files in 8 saves: {many} with four metadata keys, {one} with one")
raw = save(tensors)
header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
order = sorted(header, key=lambda name: header[name]["data_offsets"])
print("given z, a, m, w; stored", ", ".join(order))
if many == 1 or one != 1 or order != ["w", "a", "z", "m"]:
    sys.exit("not as described")
EOF
"$dir/venv/bin/python" -I "$dir/show.py"
