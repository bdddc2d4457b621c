import pytest

from optimum_sab.calibration.allocation.ladder import ladder_of
from optimum_sab.core.settings import LayerSettings


@pytest.mark.parametrize("asked", ["trellis16", "trellis16x2"])
def test_a_level_has_the_code_for_its_planes_or_none_where_there_are_too_many(asked):
    codes = {step: settings.code for step, settings in ladder_of(LayerSettings(code=asked)).items()}
    assert {codes[1, f] for base, f in codes if base == 1} == {"trellis16"}
    assert {codes[2, f] for base, f in codes if base == 2} == {"trellis16x2"}
    assert codes[3, 0.0] == "trellis16x2"
    assert (codes[3, 0.125], codes[4, 0.0]) == ("none", "none")


def test_without_a_code_no_level_has_one():
    assert {settings.code for settings in ladder_of(LayerSettings()).values()} == {"none"}
