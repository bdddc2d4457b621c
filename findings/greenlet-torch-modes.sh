#!/usr/bin/env bash
# torch's modes belong to the thread, not to the greenlet: a `with` block in one greenlet changes the others, for good.
#
# Packages:  greenlet 3.5.6, torch 2.13.0.
# Behaviour: greenlets of a thread each have their own contextvars, but torch.no_grad, inference_mode, autocast and
#            `with torch.device(...)` are kept per thread. A switch out of such a block leaves the mode on for whoever
#            runs next, and two blocks that do not end in the reverse of the order they began in restore the wrong
#            value: after both have ended, gradients stay off in code that never turned them off.
# Seen:      a contextvar set in greenlet A, seen in main: unset
#            main while A is inside no_grad: grad enabled False; inside inference_mode: True; inside autocast: True
#            both blocks left: grad enabled False
# Matters:   running several samples or layers in lockstep (each a greenlet that stops at a layer) is handy for
#            calibration. Put the modes around the loop that switches, never around a switch inside a greenlet.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 greenlet==3.5.6 numpy==2.4.6

cat > "$dir/show.py" <<'EOF'
import contextvars
import sys

import torch
from greenlet import getcurrent, greenlet

main = getcurrent()
variable = contextvars.ContextVar("variable", default="unset")


def stop_inside(mode):
    def body():
        variable.set("set")
        with mode():
            main.switch()

    return greenlet(body)


def look(mode, probe):
    stopped = stop_inside(mode)
    stopped.switch()
    seen = probe()
    stopped.switch()
    return seen


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


seen = {
    "grad enabled beside no_grad": look(torch.no_grad, torch.is_grad_enabled),
    "inference mode beside inference_mode": look(torch.inference_mode, torch.is_inference_mode_enabled),
    "autocast beside autocast": look(autocast, lambda: torch.is_autocast_enabled("cpu")),
    "device beside device('meta')": look(lambda: torch.device("meta"), lambda: torch.empty(1).device.type),
    "contextvar": variable.get(),
    "grad enabled before two blocks": torch.is_grad_enabled(),
}
first, second = stop_inside(torch.no_grad), stop_inside(torch.no_grad)
for each in (first, second, first, second):  # enter, enter, leave the first, leave the second
    each.switch()
seen["grad enabled after both"] = torch.is_grad_enabled()
for name, value in seen.items():
    print(f"{name}: {value}")
if list(seen.values()) != [False, True, True, "meta", "unset", True, False]:
    sys.exit("not as described")
EOF
"$dir/venv/bin/python" -I "$dir/show.py"
