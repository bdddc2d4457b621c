#!/usr/bin/env bash
# pytest-xdist's groups silently do nothing under pytest 9.2: tests marked with one name run in several workers.
#
# Packages:  pytest-xdist 3.8.0 with pytest 9.2.0, and with pytest 9.1.1 beside it.
# Behaviour: `--dist loadgroup` keeps tests marked `xdist_group("name")` in one worker by writing "@name" behind their
#            node identifiers, into the attribute `_nodeid`. pytest 9.2 keeps the identifier elsewhere, so the assignment
#            changes nothing and every test is a group of its own. The session still says "scheduling tests via
#            LoadGroupScheduling", and neither package warns.
# Seen:      40 tests of one group, two workers: pytest 9.1.1: one worker; pytest 9.2.0: two
# Matters:   What a group protects (a port, a compiler cache, a module-wide fixture of minutes) is made twice, at the same
#            time. `--dist loadfile` and `loadscope` do not depend on that attribute and work under both.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
mkdir "$dir/tests"
cat > "$dir/tests/test_group.py" <<'EOF'
import os
import time

import pytest

pytestmark = pytest.mark.xdist_group("one")


@pytest.mark.parametrize("number", range(40))
def test_worker(number):
    time.sleep(0.02)
    with open(os.environ["SEEN"], "a") as seen:
        print(os.environ["PYTEST_XDIST_WORKER"], file=seen)
EOF

workers() { # PYTEST-VERSION DISTRIBUTION
  local venv="$dir/venv-$1"
  if [ ! -d "$venv" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check "pytest==$1" pytest-xdist==3.8.0
  fi
  rm -f "$dir/seen"
  (cd "$dir/tests" && SEEN="$dir/seen" "$venv/bin/python" -I -m pytest -q -p no:cacheprovider -n 2 --dist "$2" >"$dir/log")
  sort "$dir/seen" | uniq | wc -l
}

old="$(workers 9.1.1 loadgroup)" new="$(workers 9.2.0 loadgroup)" file="$(workers 9.2.0 loadfile)"
echo "workers that ran the tests of one group: pytest 9.1.1: $old, pytest 9.2.0: $new; 9.2.0 with loadfile: $file"
[ "$old $new $file" = "1 2 1" ] || { echo "not as described"; exit 1; }
