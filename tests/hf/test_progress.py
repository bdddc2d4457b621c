import io
from types import SimpleNamespace

import pytest

from optimum_sab.calibration.blocks.report import BlockReport
from optimum_sab.hf import progress as module
from optimum_sab.hf.progress import shown_progress


@pytest.fixture
def shown(monkeypatch):
    """What the bars write."""
    stream, plain = io.StringIO(), module.tqdm
    monkeypatch.setattr(module, "tqdm", type("Bar", (plain,), {"__init__": _into(plain, stream)}))
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def _into(plain, stream):
    def start(self, **options):
        plain.__init__(self, file=stream, mininterval=0, **options)

    return start


def report(index):
    return BlockReport(index, (), 0.25, 1.5)


def test_stages_have_a_bar_each(shown, monkeypatch):
    monkeypatch.setattr(BlockReport, "error", property(lambda self: 0.5))
    with shown_progress("bar") as progress:
        steps = progress.steps("Writing samples", "answer")
        steps(2, 4)
        steps(5, 6)  # the total may grow
        progress.on_block(report(0), 2)
        progress.on_block(report(1), 2)
    text = shown.getvalue()
    assert "Writing samples" in text and "5/6" in text
    assert "Binarizing" in text and "2/2" in text and "error=0.5000" in text
    assert "block   0" not in text


def test_lines_tell_every_block(shown, monkeypatch):
    monkeypatch.setattr(BlockReport, "error", property(lambda self: 0.5))
    told = []
    with shown_progress("lines") as progress:
        monkeypatch.setattr(module.tqdm, "write", staticmethod(lambda line, **options: told.append(line)))
        progress.on_block(report(7), 8)
    assert told == ["block   7   error 0.5000   drift 0.2500   1.5 s"]


def test_lines_in_a_file_tell_every_stage_without_bars(capsys, monkeypatch):
    monkeypatch.setattr(BlockReport, "error", property(lambda self: 0.5))
    with shown_progress("lines") as progress:
        steps = progress.steps("Measuring", "sample")
        for done in range(1, 4):
            steps(done, 3)
        progress.on_block(report(0), 2)
    assert capsys.readouterr().err.splitlines() == [
        "Measuring: 3 of 3 samples, 0 s",
        "block   0   error 0.5000   drift 0.2500   1.5 s",
    ]


def test_lines_in_a_file_tell_now_and_then_of_a_long_stage(capsys, monkeypatch):
    clock = iter((0.0, 10.0, 31.0, 40.0, 62.0))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    steps = module.Progress("lines").steps("Writing", "answer")
    for done in range(1, 5):
        steps(done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Writing: 2 of 100 answers, 31 s", "Writing: 4 of 100 answers, 62 s"]


def test_what_is_done_soon_is_done_without_a_word(capsys, monkeypatch):
    clock = iter((0.0, 2.0, 4.0, 100.0, 104.0, 105.5))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    soon = module.Progress("lines").steps("Reading", "sample", delay=5.0)
    for done in (1, 2):
        soon(done, 2)
    assert capsys.readouterr().err == ""
    late = module.Progress("lines").steps("Reading", "sample", delay=5.0)
    for done in (1, 2):
        late(done, 2)
    assert capsys.readouterr().err == "Reading: 2 of 2 samples, 6 s\n"


def test_a_bar_of_what_is_done_soon_is_not_shown(shown):
    with shown_progress("bar") as progress:
        progress.steps("Reading", "sample", delay=60.0)(2, 2)
    assert shown.getvalue() == ""


def test_lines_in_a_terminal_have_bars_too(shown, monkeypatch):
    monkeypatch.setattr(module.sys, "stderr", SimpleNamespace(isatty=lambda: True))
    with shown_progress("lines") as progress:
        progress.steps("Measuring", "sample")(1, 2)
    assert "Measuring:  50%" in shown.getvalue()


def test_none_writes_nothing(shown):
    with shown_progress("none") as progress:
        progress.steps("Refining", "step")(1, 2)
        progress.on_block(report(0), 1)
    assert shown.getvalue() == ""


def test_bars_are_closed_after_an_error(shown):
    def interrupted():
        with shown_progress("bar") as progress:
            progress.steps("Refining", "step")(1, 2)
            kept.append(progress)
            raise KeyboardInterrupt

    kept = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not kept[0]._open
