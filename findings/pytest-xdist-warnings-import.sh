#!/usr/bin/env bash
# The process of pytest-xdist that only hands out tests imports the modules that workers' warnings are of, each worker's in
# a thread of its own.
#
# Packages:  pytest 9.2.0, pytest-xdist 3.8.0.
# Behaviour: a worker sends a warning as names and arguments, and the controller makes it again: it imports the module of the
#            warning's class, in the thread that reads from that worker. So what only tests import is imported there too, with
#            all that its import does, in several threads at once and none of them the main one.
# Seen:      a module that a test alone imports, with a warning class of its own, is imported in the worker's main thread and
#            in another thread of the controller; with a built-in category it is not imported in the controller
# Matters:   where the packages are large and import each other (PEFT, Transformers, and what registers itself with them), two
#            such threads can begin at opposite ends and find each other's import locks held: the controller stops with an
#            internal error after minutes of passing tests, now and then. Importing them in conftest.py, before there are
#            threads, keeps it from happening; taking imports out of conftest.py to save time brings it about. What
#            also helps, without an import, is to send built-in categories alone: a worker's `pytest_warning_recorded`,
#            called before pytest-xdist's, may change the record.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check pytest==9.2.0 pytest-xdist==3.8.0

mkdir "$dir/tests"
cat > "$dir/tests/imported.py" <<'EOF2'
import os
import threading

with open(os.environ["SEEN"], "a") as file:
    process = os.environ.get("PYTEST_XDIST_WORKER", "controller")
    thread = "main" if threading.current_thread() is threading.main_thread() else "another"
    file.write(f"{process}: {thread} thread\n")


class OwnWarning(UserWarning):
    pass
EOF2
cat > "$dir/tests/test_warning.py" <<'EOF2'
import os
import warnings


def test_warns():
    import imported

    warnings.warn("seen", imported.OwnWarning if os.environ["KIND"] == "own" else UserWarning)
EOF2

# shown KIND: who imported the module
shown() {
  : > "$dir/seen"
  (cd "$dir/tests" && KIND="$1" SEEN="$dir/seen" PYTHONPATH="$dir/tests" ../venv/bin/python -m pytest -q -n 1 -p no:cacheprovider >"$dir/log" 2>&1) || {
    cat "$dir/log"
    exit 1
  }
  sort "$dir/seen"
}

own="$(shown own)" builtin="$(shown builtin)"
printf 'a warning of its own class:\n%s\na built-in category:\n%s\n' "$own" "$builtin"
[ "$own" = $'controller: another thread\ngw0: main thread' ]
[ "$builtin" = "gw0: main thread" ]
echo "as described"
