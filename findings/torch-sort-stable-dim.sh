#!/usr/bin/env bash
# torch.sort and torch.argsort refuse their documented call as soon as stable is given: dim has to be named then.
#
# Packages:  torch 2.13.0.
# Behaviour: the docstring's signature is sort(input, dim=-1, descending=False, *, stable=False), and argsort's the same.
#            torch.sort(x, 0) and torch.sort(x, 0, True) work; torch.sort(x, 0, stable=True) is a TypeError, whatever is
#            given by position behind the tensor. There are two overloads, and in the one with stable everything is
#            keyword-only; stable=False asks for that one as well.
# Seen:      sort(x, 0): works. sort(x, 0, stable=False), sort(x, 0, stable=True), argsort(x, 0, stable=True),
#            x.argsort(0, stable=True): TypeError. With dim=0 all of them work.
# Matters:   making a sort stable, so that ties come out the same everywhere, breaks a call that worked, and the message
#            ("takes from 2 to 1 positional arguments but 3 were given" where descending is positional) names no remedy.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$dir/show.py" <<'EOF'
import sys

import torch

x = torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
documented = [" ".join(f.__doc__.split())[:70] for f in (torch.sort, torch.argsort)]
print("\n".join(documented))
calls = {
    "sort(x, 0)": (lambda: torch.sort(x, 0), True),
    "sort(x, 0, True)": (lambda: torch.sort(x, 0, True), True),
    "sort(x, 0, stable=False)": (lambda: torch.sort(x, 0, stable=False), False),
    "sort(x, 0, stable=True)": (lambda: torch.sort(x, 0, stable=True), False),
    "sort(x, 0, True, stable=True)": (lambda: torch.sort(x, 0, True, stable=True), False),
    "argsort(x, 0, stable=True)": (lambda: torch.argsort(x, 0, stable=True), False),
    "argsort(x, 0, True, stable=True)": (lambda: torch.argsort(x, 0, True, stable=True), False),
    "x.argsort(0, stable=True)": (lambda: x.argsort(0, stable=True), False),
    "sort(x, dim=0, stable=True)": (lambda: torch.sort(x, dim=0, stable=True), True),
    "argsort(x, dim=0, descending=True, stable=True)": (lambda: x.argsort(dim=0, descending=True, stable=True), True),
}
as_described = all("dim=-1, descending=False, *, stable=False" in text for text in documented)
for name, (call, works) in calls.items():
    try:
        call()
        found, said = True, "works"
    except TypeError as error:
        found, said = False, f"TypeError: {str(error).splitlines()[0][:90]}"
    print(f"{name}: {said}")
    as_described &= found == works
if not as_described:
    sys.exit("not as described")
EOF
"$dir/venv/bin/python" -I "$dir/show.py"
