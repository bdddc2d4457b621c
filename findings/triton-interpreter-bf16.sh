#!/usr/bin/env bash
# Triton's interpreter computes bfloat16 on the bit patterns: one plus one is 1.7e38.
#
# Packages:  triton 3.7.1, numpy 2.4.6, torch 2.13.0 (the same was seen with triton 3.6.0, 3.8.0 and 3.9.0).
# Behaviour: NumPy has no bfloat16, so the interpreter (TRITON_INTERPRET=1) holds it as uint16 and lets NumPy add,
#            multiply, sum and tl.dot these integers. Nothing warns or raises, though upstream calls bfloat16 arithmetic
#            unsupported there (triton issues 11584, 11604). float16 is right, and float8 is right in tl.dot, so nothing
#            suggests it.
# Seen:      bfloat16 1 + 1          -> 1.7014118346046923e+38
#            tl.dot of bfloat16 ones -> 4228120576.0 (16 is right)
#            tl.dot of float16 ones  -> 16.0
#            after .to(tl.float32)   -> 2.0 and 16.0
# Matters:   a kernel that is right on the GPU fails its interpreter test by 38 orders of magnitude. Test in float16, or
#            cast loaded bfloat16 to float32 before any arithmetic (for the way back see
#            triton-interpreter-bf16-cast.sh).
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
pip() { "$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check "$@"; }
pip torch==2.13.0 numpy==2.4.6
pip --no-deps triton==3.7.1

cat > "$dir/show.py" <<'EOF'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def add(x, y, out, WIDEN: tl.constexpr):
    a = tl.load(x)
    b = tl.load(y)
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    tl.store(out, a + b)


@triton.jit
def dot(x, y, out, WIDEN: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a = tl.load(x + at)
    b = tl.load(y + at)
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    tl.store(out + at, tl.dot(a, b))


def run(dtype: torch.dtype, widen: bool) -> tuple[float, float]:
    ones, total, product = torch.ones(16, 16, dtype=dtype), torch.zeros(1), torch.zeros(16, 16)
    add[(1,)](ones, ones, total, WIDEN=widen)
    dot[(1,)](ones, ones, product, WIDEN=widen, SIZE=16)
    print(f"{dtype}, widened first: {widen}: 1 + 1 = {total.item()}, dot of 16 ones = {product[0, 0].item()}")
    return total.item(), product[0, 0].item()


right = (2.0, 16.0)
wrong = run(torch.bfloat16, False)
expected = run(torch.float16, False) == right and run(torch.bfloat16, True) == right
if not expected or wrong[0] < 1e38 or wrong[1] == right[1]:
    sys.exit("not as described")
EOF
TRITON_INTERPRET=1 "$dir/venv/bin/python" -I "$dir/show.py"
