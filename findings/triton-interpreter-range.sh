#!/usr/bin/env bash
# Triton's interpreter cannot run a loop over a runtime bound with the newest NumPy.
#
# Packages:  triton 3.6.0 with numpy 2.4.6 (fails) and 2.3.5 (works); triton 3.7.1 with numpy 2.4.6; torch 2.13.0.
# Behaviour: under TRITON_INTERPRET=1, `for k in range(0, n)` in a kernel, where n is an argument, asks NumPy to turn an
#            array of one element into a Python int. NumPy 2.4 refuses that; up to 2.3 it was a DeprecationWarning. A
#            kernel without such a loop runs, so a test suite fails in part only, and triton names no limit for numpy.
# Seen:      triton 3.6.0 numpy 2.3.5: 136.0
#            triton 3.6.0 numpy 2.4.6: InterpreterError: TypeError('only 0-dimensional arrays can be converted ...')
#            triton 3.7.1 numpy 2.4.6: 136.0
# Matters:   kernels are tested without a GPU under this interpreter, and every matmul loops over a runtime K. Whoever
#            supports triton <= 3.6 needs numpy < 2.4 there.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
pip() { "$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check "$@"; }

cat > "$dir/show.py" <<'EOF'
import sys

import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def total(x, out, n):
    acc = 0.0
    for k in range(0, n):
        acc += tl.load(x + k)
    tl.store(out, acc)


@triton.jit
def double(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at) * 2)


x, doubled, summed = torch.arange(1.0, 17.0), torch.zeros(16), torch.zeros(1)
double[(1,)](x, doubled, SIZE=16)
assert torch.equal(doubled, 2 * x), "the kernel without a loop fails too"
try:
    total[(1,)](x, summed, 16)
    got = str(summed.item())
except Exception as error:
    got = f"{type(error).__name__}: {error.__cause__!r}"
print(f"triton {triton.__version__} numpy {numpy.__version__}: {got}")
if not got.startswith(sys.argv[1]):
    sys.exit(f"not as described: expected {sys.argv[1]}")
EOF

show() { TRITON_INTERPRET=1 "$dir/venv/bin/python" -I -W ignore "$dir/show.py" "$1"; }
pip torch==2.13.0 numpy==2.3.5
pip --no-deps triton==3.6.0
show "136.0"
pip --no-deps numpy==2.4.6
show "InterpreterError: TypeError"
pip --no-deps triton==3.7.1
show "136.0"
