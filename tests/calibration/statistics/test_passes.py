import pytest

from optimum_sab.calibration.statistics import passes
from optimum_sab.calibration.statistics.hessian import HessianPass
from optimum_sab.calibration.statistics.passes import CalibrationPass, calibration_pass, register_pass
from optimum_sab.errors import ConfigError


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(passes, "PASSES", dict(passes.PASSES))


def test_registered_pass_is_found_by_its_name():
    class Mine(CalibrationPass):
        def collect(self, name, inputs, device): ...

    assert register_pass("mine")(Mine) is Mine
    assert calibration_pass("mine") is Mine
    assert calibration_pass("hessian") is HessianPass


def test_registering_the_same_class_again_does_nothing():
    register_pass("hessian")(HessianPass)
    assert calibration_pass("hessian") is HessianPass


def test_registering_a_redefined_class_takes_the_new_one():
    def define():
        class Mine(CalibrationPass):
            def collect(self, name, inputs, device): ...

        return Mine

    first, second = define(), define()
    register_pass("mine")(first)
    register_pass("mine")(second)  # a notebook cell that is run again
    assert calibration_pass("mine") is second


def test_taken_name_is_refused_and_stays_with_its_owner():
    class Other(CalibrationPass):
        def collect(self, name, inputs, device): ...

    with pytest.raises(ConfigError, match=r"'hessian' is registered already \(HessianPass\)"):
        register_pass("hessian")(Other)
    assert calibration_pass("hessian") is HessianPass


def test_unknown_pass_names_the_known_ones():
    with pytest.raises(ConfigError, match="calibration_pass='hesian' is not registered; did you mean 'hessian'"):
        calibration_pass("hesian")
