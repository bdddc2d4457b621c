"""Limits on a family's time and memory, and what is said of one that goes beyond."""

import itertools
import multiprocessing
import os
import time

import pytest

from optimum_sab.bench.coverage import isolation, trial
from optimum_sab.bench.coverage.families import find_families
from optimum_sab.bench.coverage.isolation import Limits, run_limited, try_families, try_family
from optimum_sab.bench.coverage.outcome import FAILED, NOT_BUILT, WORKS
from optimum_sab.errors import ConfigError


@pytest.fixture
def forked(monkeypatch):
    """Processes forked from this one, which has imported everything already."""
    monkeypatch.setattr(isolation, "CONTEXT", multiprocessing.get_context("fork"))


@pytest.fixture
def llama():
    return find_families(["llama"])[0]


def at_stage(stage, work):
    """The first half of a trial, which comes to a stage and does something else there."""

    def quantize(family, folder):
        trial.Notes(folder).note(stage=stage, pictures=8)
        work()

    return quantize


def test_process_over_its_time_is_ended(forked, tmp_path):
    began = time.perf_counter()
    assert run_limited(time.sleep, (60,), Limits(seconds=0.1), tmp_path / "log") == "over its time of 0.1 s"
    assert time.perf_counter() - began < 20
    assert run_limited(sum, (itertools.repeat(1),), Limits(seconds=1), tmp_path / "log") == "over its time of 1 s"


def test_process_over_its_memory_is_ended(forked, tmp_path):
    limits = Limits(gigabytes=0.5)
    assert run_limited(bytearray, (1 << 20,), limits, tmp_path / "log") is None
    assert "MemoryError" in run_limited(bytearray, (1 << 30,), limits, tmp_path / "log")


def test_process_that_dies_is_told_by_its_status(forked, tmp_path):
    assert run_limited(os._exit, (7,), Limits(), tmp_path / "log") == "its process ended with status 7"


@pytest.mark.parametrize(("stage", "outcome"), [("build", NOT_BUILT), ("quantize", FAILED)])
def test_family_over_its_time_fails_at_its_stage(forked, llama, monkeypatch, stage, outcome):
    monkeypatch.setattr(trial, "quantize", at_stage(stage, lambda: time.sleep(60)))
    found = try_family(llama, Limits(seconds=0.1))
    assert (found.family, found.outcome, found.stage) == ("llama", outcome, stage)
    assert found.reason == "over its time of 0.1 s"
    assert found.pictures == 8


def test_second_half_is_not_tried_where_the_first_failed(forked, llama, monkeypatch):
    monkeypatch.setattr(trial, "quantize", at_stage("save", lambda: os._exit(1)))
    monkeypatch.setattr(trial, "use", lambda family, folder: trial.Notes(folder).note(outcome=WORKS))
    assert try_family(llama, Limits()).outcome == FAILED
    monkeypatch.setattr(trial, "quantize", at_stage("save", lambda: None))
    assert try_family(llama, Limits()).outcome == WORKS


@pytest.mark.parametrize("limits", [Limits(jobs=0), Limits(seconds=0), Limits(gigabytes=-1)])
def test_limits_must_leave_something(limits):
    with pytest.raises(ConfigError, match="must be above 0"):
        next(try_families([], limits))
