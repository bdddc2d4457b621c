"""What `tests/conftest.py` does for the workers of pytest-xdist, and for the process that hands out tests to them."""

import subprocess
import sys
import warnings

import pytest

from optimum_sab.errors import SABWarning
from tests import conftest


def recorded(category):
    found = warnings.WarningMessage(category("said"), category, "file.py", 3)
    conftest.pytest_warning_recorded(found)
    return found


def test_a_worker_sends_warnings_of_python_s_own_classes(monkeypatch):
    monkeypatch.setattr(conftest, "WORKER", "gw1")
    found = recorded(SABWarning)
    assert found.category is type(found.message) is UserWarning
    assert str(found.message) == "optimum_sab.errors.SABWarning: said"


@pytest.mark.parametrize(("worker", "category"), [("", SABWarning), ("gw0", FutureWarning)])
def test_other_warnings_stay_as_they_are(worker, category, monkeypatch):
    monkeypatch.setattr(conftest, "WORKER", worker)
    found = recorded(category)
    assert found.category is type(found.message) is category and str(found.message) == "said"


def test_the_process_that_hands_out_tests_imports_nothing_for_them():
    code = "import sys, tests.conftest; assert not {'torch', 'transformers', 'optimum_sab'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=conftest.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
