"""Small caches and buffers, so that the benchmarks' tests move little memory."""

import pytest

from optimum_sab.bench import timing


@pytest.fixture
def small_machine(monkeypatch):
    """The CPU's caches count as 64 KiB and the copy that measures bandwidth moves 4 MiB."""
    real = timing.last_level_cache
    monkeypatch.setattr(timing, "last_level_cache", lambda d: 1 << 16 if d.type == "cpu" else real(d))
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 1 << 22)
