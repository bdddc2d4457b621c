#!/usr/bin/env bash
# A model read from safetensors may compute other bits than the one that was saved: it depends on the header's length.
#
# Packages:  torch 2.13.0 (PyPI and CPU builds, x86-64, MKL 2024.2), safetensors 0.8.0.
# Behaviour: load_file maps the file, and tensors begin wherever they stand in it: data begin behind a header padded to 8
#            bytes, so a weight's address is a multiple of 8 and often not of 16. A float32 linear of a single row (decoding
#            one token) goes through MKL's matrix-vector product, whose order of summation depends on the address modulo
#            16 bytes. With more rows the result does not depend on it.
# Seen:      the same weight at 16 addresses, one row: largest difference by the address modulo 64 bytes
#            [0, 5.7e-06, 3.8e-06, 5.7e-06, 0, 5.7e-06, ...]; nine rows: 0 everywhere
#            saved with 64 lengths of metadata and loaded: one row has two results, nine rows have one
# Matters:   "reloads to the same logits, bit for bit" fails for whoever compares a model in memory with the one that was
#            read again, with every weight equal. Compare after copying the parameters (`p.data = p.data.clone()`), which
#            aligns them, or compare the weights.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 \
  safetensors==0.8.0

cat > "$dir/show.py" <<'EOF'
import sys

import torch
from safetensors.torch import load_file, save_file

folder = sys.argv[1]
torch.manual_seed(0)
torch.set_num_threads(1)
weight, one, nine = torch.randn(512, 128), torch.randn(1, 1, 128), torch.randn(1, 9, 128)


def at(offset):
    """A copy of the weight, `offset` floats behind a multiple of 64 bytes."""
    store = torch.empty(weight.numel() + 64)
    start = (-store.data_ptr() // 4) % 16 + offset
    return store[start : start + weight.numel()].view_as(weight).copy_(weight)


def differences(x):
    first = torch.nn.functional.linear(x, at(0))
    return [float((torch.nn.functional.linear(x, at(offset)) - first).abs().max()) for offset in range(16)]


def results(x, files):
    return {torch.nn.functional.linear(x, load_file(file)["weight"]).numpy().tobytes() for file in files}


apart = {"one row": differences(one), "nine rows": differences(nine)}
for name, found in apart.items():
    print(f"{name}, by address modulo 64 bytes: {found}")
files = []
for length in range(64):
    files.append(f"{folder}/{length}.safetensors")
    save_file({"weight": weight}, files[-1], metadata={"note": "x" * length})
addresses = sorted({load_file(file)["weight"].data_ptr() % 16 for file in files})
counts = {"one row": len(results(one, files)), "nine rows": len(results(nine, files))}
print("addresses of loaded weights modulo 16:", addresses)
print("different results of 64 files that hold the same weight:", counts)
if not max(apart["one row"]) > 0 or max(apart["nine rows"]) > 0 or counts != {"one row": 2, "nine rows": 1}:
    sys.exit("not as described")
EOF
"$dir/venv/bin/python" -I "$dir/show.py" "$dir"
