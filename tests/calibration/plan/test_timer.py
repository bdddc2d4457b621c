"""Trials are timed so that a busy machine tells about the same as a quiet one."""

import pytest
import torch

from optimum_sab.calibration.plan import operations, timer, trial
from optimum_sab.calibration.plan.timer import Timer
from optimum_sab.calibration.plan.trial import time_factorization, time_solving
from optimum_sab.core.settings import LayerSettings

CPU = torch.device("cpu")


class Clock:
    """Processor time of this thread and of the process, which what is timed moves on."""

    def __init__(self, monkeypatch):
        self.thread = self.process = self.wall = 0.0
        monkeypatch.setattr(timer.time, "thread_time", lambda: self.thread)
        monkeypatch.setattr(timer.time, "process_time", lambda: self.process)
        monkeypatch.setattr(timer.time, "perf_counter", lambda: self.wall)

    def work(self, thread, others=0.0):
        self.thread += thread
        self.process += thread + others
        self.wall += thread + others


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.mark.parametrize(
    ("own", "others", "seconds"),
    [
        (1.0, 1.0, 1.0),  # shared evenly
        (1.0, 0.0, 1.0),  # by this thread alone, as Python is
        (0.0, 2.0, 1.0),  # by another, while this one had no core
    ],
)
def test_the_rate_is_of_the_thread_or_of_all_on_average(clock, monkeypatch, own, others, seconds):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert Timer(CPU).rate(lambda: clock.work(own, others), 12.0) == pytest.approx(12.0 / seconds)


def test_the_rate_is_that_of_the_least_try_but_the_first(clock):
    tries = iter([0.01, 0.08, 0.05, 0.07])  # the first, of which there is nothing to learn; then as long as is enough
    assert Timer(CPU).rate(lambda: clock.work(next(tries)), 1.0) == pytest.approx(1 / 0.05)
    assert next(tries, None) is None


def test_factors_of_other_widths_are_told_from_two(clock, monkeypatch):
    """Of ``n³ / a + b n²`` seconds."""
    a, b = 3.0e10, 2.0e-9
    monkeypatch.setattr(
        trial, "factor_hessian", lambda square, _: clock.work(2 / 3 * len(square) ** 3 / a + b * len(square) ** 2)
    )
    speed, entry = time_factorization(torch.empty(2048, 2048), Timer(CPU))
    assert speed == pytest.approx(a) and entry == pytest.approx(b)
    narrow = 600
    monkeypatch.setattr(trial, "factor_hessian", lambda square, _: clock.work(4 / 3 * len(square) ** 3 / a))
    assert time_factorization(torch.empty(narrow, narrow), Timer(CPU)) == (pytest.approx(a), 0.0)


def test_a_solve_is_timed_with_all_threads_and_experts_with_one_each(monkeypatch):
    used = []
    monkeypatch.setattr(trial, "_solve_seconds", lambda *_: used.append(torch.get_num_threads()) or seconds[used[-1]])
    monkeypatch.setattr(trial.operations, "solving", lambda *_: {"refit": 60.0, "descent": 40.0})
    seconds = {3: {"refit": 3.0, "descent": 8.0}, 1: {"refit": 6.0, "descent": 5.0}}
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = time_solving(torch.randn, LayerSettings(), (64, 64), True, Timer(CPU))
        assert used == [3, 1, 3] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert found.parts == {"refit": 20.0, "descent": 8.0}  # no slower than one thread
    assert found.experts == {"refit": 30.0, "descent": 24.0}
    assert found.least == 11.0


def test_a_trial_times_every_part_of_a_solve():
    """With something to correct, which streams that are apart by chance alone do not have."""
    timed, generator = Timer(CPU), torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    found = time_solving(drawn, LayerSettings(iterations=1, block_size=128), (64, 256), True, timed)
    assert set(found.parts) == set(found.experts) == set(operations.SOLVING)
    assert found.parts["target"] < 100 * found.parts["refit"]
    assert 0 < found.least < 5
