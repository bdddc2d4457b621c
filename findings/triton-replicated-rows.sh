#!/usr/bin/env bash
# Which way a tile lies in memory decides how often Triton computes what there is once for each of its rows.
#
# Packages:  triton 3.7.1 (compiled for sm_90; no GPU needed), torch 2.13.0.
# Behaviour: a loop takes a column out of a tile of 32 by 32 in registers, computes something for each row, and changes the
#            other columns by it. Where columns lie side by side in memory, the tile's layout follows the load: lanes lie along
#            the columns, and a vector of one value a row, which comes of a sum over them, is held by every lane in full. So
#            each of 32 lanes computes all 32 rows, 32 times the work, beside 5 shuffles a row. Where rows lie side by side,
#            and the tile has 64 of them, lanes lie along the rows and each computes its own.
# Seen:      exponentials in the loop's body for 32 rows and one warp: 32 with columns side by side (one would do);
#            2 for 64 rows with rows side by side (the least there can be); shuffles 160 and 2
# Matters:   nothing in the kernel's text says so, and both are right. A solver that goes from column to column (GPTQ's
#            error feedback, coordinate descent, a recurrence) takes several times as long until its tile is transposed.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 triton==3.7.1

cat > "$dir/show.py" <<'EOF'
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def columns_side_by_side(x_ptr, out_ptr, factor_ptr, stride, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + row[:, None] * stride + column[None, :])
    for j in range(count):
        mine = tl.exp(tl.sum(tl.where((column == j)[None, :], x, 0.0), 1))
        x -= mine[:, None] * tl.load(factor_ptr + j * COLUMNS + column)[None, :]
        tl.store(out_ptr + j * ROWS + row, mine)


@triton.jit
def rows_side_by_side(x_ptr, out_ptr, factor_ptr, stride, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + column[:, None] * stride + row[None, :])
    for j in range(count):
        mine = tl.exp(tl.sum(tl.where((column == j)[:, None], x, 0.0), 0))
        x -= tl.load(factor_ptr + j * COLUMNS + column)[:, None] * mine[None, :]
        tl.store(out_ptr + j * ROWS + row, mine)


def in_the_loop(kernel, rows, columns):
    """Exponentials and shuffles in the only loop of a warp's program."""
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "factor_ptr": "*fp32", "stride": "i32", "count": "i32"}
    types |= {"ROWS": "constexpr", "COLUMNS": "constexpr"}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(3)}
    source = ASTSource(fn=kernel, signature=types, constexprs={(5,): rows, (6,): columns}, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1, "num_stages": 1})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout
    code = [
        (int(m[1], 16), m[2], m[3])
        for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;\n]*)", text)
    ]
    back = [(int(m[1], 16), at) for at, name, given in code if name == "BRA" and (m := re.search(r"0x([0-9a-f]+)", given))]
    start, end = next((to, at) for to, at in back if to < at)
    body = [name for at, name, _ in code if start <= at <= end]
    return sum(name.startswith("MUFU.EX2") for name in body), sum(name.startswith("SHFL") for name in body)


found = {
    "columns side by side, 32 rows": in_the_loop(columns_side_by_side, 32, 32),
    "rows side by side, 64 rows": in_the_loop(rows_side_by_side, 64, 16),
}
for name, (exponentials, shuffles) in found.items():
    print(f"{name}: {exponentials} exponentials and {shuffles} shuffles in the loop's body")
if list(found.values()) != [(32, 160), (2, 2)]:
    sys.exit("not as described")
EOF
"$dir/venv/bin/python" -I "$dir/show.py"
