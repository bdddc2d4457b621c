"""How a list of stages is gone through."""

import pytest
import torch
from torch import nn

from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.run import Run, Silent
from optimum_sab.calibration.samples.calibration_samples import CalibrationSamples
from optimum_sab.calibration.stage import Stage, check_stages, run_stages
from optimum_sab.calibration.streams import memory
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import CalibrationError
from optimum_sab.nn.selection import select_linears


class Noted(Stage):
    """Writes down what is asked of it."""

    def __init__(self, calls, name, section=None, wanted=True):
        self.name, self.title, self._calls, self._section, self._wanted = name, name.title(), calls, section, wanted

    def check(self, model, options):
        self._calls.append(("check", self.name, model, options))

    def prepare(self, run):
        self._calls.append(("prepare", self.name))

    def wanted(self, run):
        return self._wanted

    def apply(self, run, on_step):
        on_step(1, 3)
        self._calls.append(("apply", self.name, run.model.training, torch.is_grad_enabled()))
        return self._section


class Bars(Silent):
    def __init__(self):
        self.told = []

    def steps(self, title, unit):
        return lambda done, total: self.told.append((title, unit, done, total))


@pytest.fixture
def run():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(32, 32, dtype=torch.float64))])

    model = Tiny().train()
    return Run(model, select_linears(model, LayerSettings(block_size=32)), progress=Bars())


def test_every_stage_is_prepared_before_the_first_works(run):
    calls = []
    run_stages(run, (Noted(calls, "one"), Noted(calls, "two")))
    assert [(verb, name) for verb, name, *_ in calls] == [
        ("prepare", "one"),
        ("prepare", "two"),
        ("apply", "one"),
        ("apply", "two"),
    ]


def test_stages_are_checked_without_a_run(run):
    calls, options = [], RunOptions()
    check_stages((Noted(calls, "one"), Noted(calls, "two")), run.model, options)
    assert calls == [("check", "one", run.model, options), ("check", "two", run.model, options)]


def test_the_report_has_a_section_and_the_seconds_of_every_stage_that_worked(run):
    calls = []
    report = run_stages(
        run, (Noted(calls, "one", {"a": 1}), Noted(calls, "two", 2, wanted=False), Noted(calls, "three"))
    )
    assert [stage.name for stage in report.stages] == ["one", "three"]
    assert report.section("one") == {"a": 1}
    assert report.section("two") is None and report.section("three") is None
    assert all(stage.seconds >= 0 for stage in report.stages)
    assert report.seconds == pytest.approx(sum(stage.seconds for stage in report.stages))


def test_a_stage_tells_its_progress_under_its_own_title(run):
    run_stages(run, (Noted([], "one"), Noted([], "two")))
    assert run.progress.told == [("One", "step", 1, 3), ("Two", "step", 1, 3)]


def test_the_model_is_only_read_meanwhile_and_then_in_the_mode_it_was_in(run):
    calls = []
    with torch.enable_grad():
        run_stages(run, (Noted(calls, "one"),))
        assert torch.is_grad_enabled()
    assert calls[-1] == ("apply", "one", False, False)
    assert run.model.training and run.model.layers[0][0].training


def test_the_mode_comes_back_after_an_error(run):
    class Failing(Noted):
        def apply(self, run, on_step):
            raise CalibrationError("no")

    with pytest.raises(CalibrationError):
        run_stages(run, (Failing([], "one"),))
    assert run.model.training


def test_what_is_kept_is_found_by_its_class_until_it_is_taken(run):
    samples = CalibrationSamples([], [])
    assert run.kept(CalibrationSamples) is None
    run.keep(samples)
    assert run.kept(CalibrationSamples) is samples and run.samples is samples
    assert run.take(CalibrationSamples) is samples
    assert run.kept(CalibrationSamples) is None


def test_a_list_without_samples_is_named(run):
    with pytest.raises(CalibrationError, match="no stage before this one reads calibration samples"):
        run.samples


def test_a_run_knows_the_dtype_of_its_linears(run):
    assert run.dtype == torch.float64


def test_what_a_stage_has_freed_is_given_back_when_it_ends(run, monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "_malloc_trim", lambda: lambda pad: calls.append(("trimmed", pad)))
    run_stages(run, [Noted(calls, "first"), Noted(calls, "left out", wanted=False), Noted(calls, "last")])
    assert [call[:2] for call in calls if call[0] != "prepare"] == [
        ("apply", "first"),
        ("trimmed", 0),
        ("apply", "last"),
        ("trimmed", 0),
    ]
