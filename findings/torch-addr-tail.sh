#!/usr/bin/env bash
# Tensor.addr_ rounds the last elements of a row otherwise than the others, so a row's bits depend on how long it is.
#
# Packages:  torch 2.13.0, on an x86 CPU with AVX2 and FMA.
# Behaviour: a.addr_(s, m) with float32 computes a + s*m with one rounding (fused) in steps of 16 elements (two vectors of
#            8), and with two roundings in what is left behind the last whole step. The same numbers at the same place, in a
#            longer row, have other last bits. addcmul_ rounds alike everywhere.
# Seen:      63 elements against the first 63 of 256: bits differ at places 48 to 62 only, in 0.23 of the cases;
#            64 against 256: never; addcmul: never
# Matters:   error feedback (GPTQ) adds column after column so. Splitting a weight's rows over threads, stacking layers, or
#            a kernel of one's own then gives other bits, now and then another sign, unless row counts are multiples.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$dir/show.py" <<'EOF'
import sys

import torch

print("torch computes with", torch.backends.cpu.get_cpu_capability())
torch.manual_seed(0)
TRIALS, LONG = 2000, 256


def differing(length, accumulate):
    """How often each place of a short row has other bits than the same place of a long one."""
    count = torch.zeros(length, dtype=torch.long)
    for _ in range(TRIALS):
        a, m, s = torch.randn(1, LONG), torch.randn(LONG), torch.randn(1)
        long, short = a.clone(), a[:, :length].clone()
        accumulate(long, s, m)
        accumulate(short, s, m[:length])
        count += (long[0, :length] != short[0])
    return count


def addr(a, s, m):
    a.addr_(s, m)


def addcmul(a, s, m):
    a.addcmul_(s, m)


found = {}
for name, accumulate in (("addr_", addr), ("addcmul_", addcmul)):
    for length in (63, 64):
        count = differing(length, accumulate)
        places = count.nonzero().flatten().tolist()
        found[name, length] = places
        share = float(count[places].float().mean()) / TRIALS if places else 0.0
        print(f"{name} of {length} elements: other bits at {places}, in {share:.2f} of the cases there")
expected = {("addr_", 63): list(range(48, 63)), ("addr_", 64): [], ("addcmul_", 63): [], ("addcmul_", 64): []}
if found != expected:
    sys.exit("not as described")
EOF
"$dir/venv/bin/python" -I "$dir/show.py"
