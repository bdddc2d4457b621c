"""Modules of the calibration stay small enough to be read in one go."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST = 249  # lines
FOLDER = "optimum_sab/calibration"


def test_no_module_of_the_calibration_is_longer_than_one_reads():
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / FOLDER).rglob("*.py")
    }
    assert len(lines) > 100
    assert {name: count for name, count in lines.items() if count > MOST} == {}
