#!/usr/bin/env bash
# torch.equal says that packed int32 words equal their float16 cast, infinities included.
#
# Packages:  torch 2.13.0.
# Behaviour: torch.equal(a, b) with two dtypes converts both to the common one first. For int32 and float16 that is
#            float16: the words are damaged for the comparison in the same way as they were damaged before it.
#            torch.testing.assert_close compares dtypes, and torch.allclose refuses two of them.
# Seen:      int32 [1, 16777217, 2000000003, -5] as float16 is [1.0, inf, inf, -5.0]; torch.equal: True
#            the same for bfloat16 [1.0, 16777216.0, 1996488704.0, -5.0] and float32
# Matters:   "the words came back unchanged" is the test of every packed format, and with torch.equal it passes when a
#            loader cast the words to the model's dtype (see transformers-skeleton-dtype.sh). Check the dtype as well.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$dir/show.py" <<'EOF'
import sys

import torch

words = torch.tensor([1, 16777217, 2000000003, -5], dtype=torch.int32)
equal = []
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    cast = words.to(dtype)
    equal.append(torch.equal(words, cast))
    print(f"torch.equal({words.tolist()}, {cast.tolist()} as {dtype}): {equal[-1]}")
back = words.to(torch.float32).to(torch.int32)
print("and back from float32:", back.tolist())
try:
    torch.testing.assert_close(words, words.half())
    raised = False
except AssertionError:
    raised = True
print("torch.testing.assert_close raises:", raised)
if equal != [True] * 3 or not raised or torch.equal(back, words):
    sys.exit("not as described")
EOF
"$dir/venv/bin/python" -I "$dir/show.py"
