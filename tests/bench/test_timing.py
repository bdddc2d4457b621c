"""The clock: which calls it makes, and that a captured graph does the same work. No test asserts a time's size."""

import subprocess
import sys

import pytest
import torch

from optimum_sab.bench.timing import (
    CPU_ROTATION_CAP,
    GRAPH_CALLS,
    capture,
    copy_bandwidth,
    last_level_cache,
    median_seconds,
    rotation_bytes,
)

CPU = torch.device("cpu")


def test_median_seconds_takes_turns_between_sides_and_copies():
    made = []
    sides = {side: [lambda s=side, c=copy: made.append((s, c)) for copy in range(3)] for side in ("dense", "packed")}
    seconds = median_seconds(sides, CPU, repeats=4)
    assert [side for side, _ in made] == ["dense", "packed"] * 5  # one round more, which warms up
    assert [copy for side, copy in made if side == "packed"][1:] == [0, 1, 2, 0]
    assert seconds.keys() == sides.keys() and min(seconds.values()) > 0


def test_rotation_is_several_caches(small_machine, monkeypatch):
    assert rotation_bytes(CPU) == 4 * (1 << 16)
    monkeypatch.setattr("optimum_sab.bench.timing.last_level_cache", lambda device: 1 << 40)
    assert rotation_bytes(CPU) == CPU_ROTATION_CAP


def test_last_level_cache_is_at_least_a_first_level_one():
    assert last_level_cache(CPU) >= 1 << 14


def test_copy_bandwidth_counts_reads_and_writes(small_machine, monkeypatch):
    monkeypatch.setattr("optimum_sab.bench.timing.call_seconds", lambda call: 0.5)
    assert copy_bandwidth(CPU) == 2 * (1 << 22) / 0.5


@pytest.mark.gpu
def test_capture_replays_the_same_work():
    counter = torch.zeros(1, device="cuda")
    graph = capture([lambda: counter.add_(1)] * 3, "counting")
    assert counter.item() == 3  # before the capture; capturing itself runs nothing
    graph.replay()
    assert counter.item() == 6


@pytest.mark.gpu
def test_capture_names_what_waits_for_the_device():
    # in a process of its own, because torch does not leave its stream and allocator in order after a failed capture
    code = """
import torch
from optimum_sab.bench.timing import CaptureError, capture
counter = torch.zeros(1, device="cuda")
try:
    capture([lambda: counter.item()], "waiting work")
except CaptureError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("waiting work cannot be captured"), done.stderr


@pytest.mark.gpu
def test_median_seconds_replays_every_copy_equally():
    counters = [torch.zeros(1, device="cuda") for _ in range(3)]
    seconds = median_seconds({"count": [lambda c=c: c.add_(1) for c in counters]}, torch.device("cuda"), repeats=2)
    counts = {int(c.item()) for c in counters}
    assert len(counts) == 1 and counts.pop() % -(-GRAPH_CALLS // 3) == 0
    assert seconds["count"] > 0


@pytest.mark.gpu
def test_rotation_exceeds_the_gpu_cache():
    device = torch.device("cuda")
    assert rotation_bytes(device) >= max(300_000_000, 5 * last_level_cache(device))
