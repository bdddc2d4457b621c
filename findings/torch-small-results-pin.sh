#!/usr/bin/env bash
# A list of small results can make a process grow by the temporaries of every turn, though each of them is freed.
#
# Packages:  torch 2.13.0, on Linux with glibc.
# Behaviour: glibc maps a piece of some megabytes by itself until the first such piece is freed; from then on pieces of up
#            to 32 MB come from the heap. A small tensor that a turn of a loop leaves behind lies there above the
#            temporaries that were alive when it was made, and the hole below it is a little too short for the next turn's,
#            which torch aligns. So the heap grows at every turn, and nothing that Python or torch can count has grown.
#            Results written into a tensor that was there before the loop leave nothing behind, and malloc_trim(0) gives
#            back all of it.
# Seen:      divergences of bfloat16 logits, 32 rows of 65,536 a turn (temporaries of 8.4 MB in float32), 40 turns: with the
#            results in a list half of the processes or more grow by 47 to 52 temporaries on the way, others by 2 to 15,
#            as their addresses fall; with them in a tensor all by 5 to 14. After malloc_trim(0) less than one is left.
# Matters:   going through a large tensor in pieces to spare memory spares none, and the peak is that of the whole.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$dir/show.py" <<'EOF'
import ctypes
import sys

import torch

torch.set_num_threads(1)
way, turns = sys.argv[1], int(sys.argv[2])
ROWS, WIDTH = 32, 65536
mine = torch.randn(ROWS * turns, WIDTH, dtype=torch.bfloat16)
wanted = torch.randn(ROWS * turns, WIDTH, dtype=torch.bfloat16)


def divergence(mine, wanted):
    p, q = wanted.float().log_softmax(-1), mine.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def own():
    """Anonymous memory of the process, in temporaries of one turn."""
    with open("/proc/self/status") as lines:
        line = next(line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / (ROWS * WIDTH * 4)


before, most = own(), 0.0
if way == "list":
    results = []
    for some in zip(mine.split(ROWS), wanted.split(ROWS)):
        results.append(divergence(*some))
        most = max(most, own() - before)
else:
    found = torch.empty(ROWS * turns)
    for some in (slice(start, start + ROWS) for start in range(0, ROWS * turns, ROWS)):
        found[some] = divergence(mine[some], wanted[some])
        most = max(most, own() - before)
ctypes.CDLL(None).malloc_trim(0)
print(most, own() - before)
EOF

cat > "$dir/check.py" <<'EOF'
import subprocess
import sys

import torch

most = {"list": [], "tensor": []}
for way in [*most] * 6:
    said = subprocess.run([sys.executable, sys.argv[1], way, "40"], capture_output=True, text=True, check=True).stdout
    grown, trimmed = map(float, said.split())
    most[way].append(grown)
    assert trimmed < 2, "malloc_trim no longer gives it back"
for way, found in most.items():
    print(f"torch {torch.__version__}, 40 turns, {way}: at most {[round(each) for each in found]} temporaries more")
assert sum(each > 25 for each in most["list"]) >= 2, "a list no longer keeps what lies below its tensors"
assert max(most["tensor"]) < 25, "results in a tensor keep temporaries now"
EOF

"$dir/venv/bin/python" "$dir/show.py" tensor 2 > "$dir/first" # imports compiled
"$dir/venv/bin/python" "$dir/check.py" "$dir/show.py"
