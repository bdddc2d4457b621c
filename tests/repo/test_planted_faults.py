"""The list of faults fits the sources. Whether they are caught is seen by hand: python -m tests.repo.planted_faults."""

import importlib.util
import sys
from pathlib import Path

import pytest

_PATH = Path(__file__).with_name("planted_faults.py")
_SPEC = importlib.util.spec_from_file_location("planted_faults", _PATH)
planted_faults = importlib.util.module_from_spec(_SPEC)
sys.modules["planted_faults"] = planted_faults
_SPEC.loader.exec_module(planted_faults)

FAULTS = planted_faults.FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_what_is_to_be_made_wrong_stands_there_once(fault):
    source = (planted_faults.ROOT / fault.file).read_text(encoding="utf-8")
    assert source.count(fault.right) == 1
    assert fault.wrong not in (fault.right, source)


def test_the_faults_have_names_of_their_own_and_tests_that_exist():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 15
    assert [path for fault in FAULTS for path in fault.tests if not (planted_faults.ROOT / path).exists()] == []


def test_a_fault_that_no_longer_fits_is_named(tmp_path):
    (tmp_path / "one.py").write_text("a = 1\na = 1\n")
    fault = planted_faults.Fault("twice", "one.py", "a = 1", "a = 2", ())
    with pytest.raises(LookupError, match=r"stands 2 times in one\.py"):
        planted_faults.plant(fault, tmp_path)
