"""What a machine has, and what a control group leaves of it."""

import os

import pytest
import torch

from optimum_sab.calibration.plan import limits


@pytest.fixture
def grouped(tmp_path, monkeypatch):
    """A control group `a/b` of version 2 with these limits, on a machine with 8 GiB and 2 GiB of swap."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\nSwapTotal: 2097152 kB\nHugePages_Total: 0\n")
    root = tmp_path / "cgroup"
    own = root / "a" / "b"
    own.mkdir(parents=True)
    membership = tmp_path / "self"
    membership.write_text("0::/a/b\n")
    monkeypatch.setattr(limits, "_CGROUP", root)
    monkeypatch.setattr(limits, "_MEMINFO", meminfo)
    monkeypatch.setattr(limits, "_MEMBERSHIP", membership)
    monkeypatch.setattr(limits, "free_memory", lambda device: None)
    return own


def test_without_limits_it_is_memory_and_swap(grouped):
    room = limits.machine_room()
    assert (room.total, room.free, room.words) == (10 * 2**30, 4 * 2**30, "memory and swap")


def test_the_tightest_group_above_counts_with_its_swap(grouped):
    (grouped / "memory.max").write_text("max\n")
    (grouped.parent / "memory.max").write_text(f"{3 * 2**30}\n")
    (grouped.parent / "memory.swap.max").write_text("0\n")
    room = limits.machine_room()
    assert (room.total, room.free) == (3 * 2**30, 3 * 2**30)
    assert room.words == "the limit of this control group"


def test_what_a_group_holds_is_not_free_but_pages_of_files_are(grouped):
    (grouped / "memory.max").write_text(f"{3 * 2**30}\n")
    (grouped / "memory.swap.max").write_text("0\n")
    (grouped / "memory.current").write_text(f"{2 * 2**30}\n")
    assert limits.machine_room().free == 2**30
    (grouped / "memory.stat").write_text(f"anon 1\nactive_file {2**29}\ninactive_file {2**28}\n")
    assert limits.machine_room().free == 2**30 + 2**29 + 2**28
    (grouped.parent / "memory.max").write_text(f"{2**30}\n")
    (grouped.parent / "memory.swap.max").write_text("0\n")
    (grouped.parent / "memory.current").write_text(f"{2**31}\n")
    assert limits.machine_room().free == 0


def test_a_group_may_swap_as_much_as_there_is(grouped):
    (grouped / "memory.max").write_text(f"{3 * 2**30}\n")
    assert limits.machine_room().total == 5 * 2**30


def test_a_limit_above_the_machine_is_none(grouped):
    (grouped / "memory.max").write_text(f"{64 * 2**30}\n")
    assert limits.machine_room().total == 10 * 2**30


def test_version_1_counts_memory_and_swap_together(grouped, monkeypatch):
    limits._MEMBERSHIP.write_text("5:cpu,memory:/job\n")
    folder = limits._CGROUP / "memory" / "job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{2**30}\n")
    assert limits.machine_room().total == 3 * 2**30  # with the machine's swap
    (folder / "memory.memsw.limit_in_bytes").write_text(f"{2**30}\n")
    assert limits.machine_room().total == 2**30


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="no Linux")
def test_this_machine_has_more_than_is_free_of_it():
    room = limits.machine_room()
    assert 0 < room.free <= room.total
    assert 0 < limits.process_bytes() < room.total


def test_an_accelerator_that_is_not_cuda_is_not_known():
    assert limits.accelerator_room(torch.device("meta")).total is None
