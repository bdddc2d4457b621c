"""Seconds and peak memory of the parts of a long piece of work (`optimum_sab.core.parts`)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc(5)


@dataclass
class PartUse:
    """What one part took, without the parts inside of it.

    Attributes:
        calls: how often it was entered.
        seconds: wall time.
        cpu_seconds: of all threads of the process; on a busy machine it says more.
        peak_memory_bytes: the most that was in use while it ran: allocated by torch on CUDA, resident in memory on
            the CPU, the model included. 0 where the system does not tell.
        own_memory_bytes: the most that was resident and of no file, at the boundaries of parts, which miss what comes
            and goes between them. 0 where the system does not tell, and on CUDA.
        mapped_memory_bytes: the same of mapped files and shared memory, which the system can take back.
    """

    calls: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0
    own_memory_bytes: int = 0
    mapped_memory_bytes: int = 0


@dataclass
class PartWatch:
    """Adds up what parts take, by the names of those around them and their own.

    Args:
        device: where the work is done; it is waited for at every boundary.
    """

    device: torch.device
    used: dict[tuple[str, ...], PartUse] = field(default_factory=dict)
    _path: tuple[str, ...] = ()
    _since: tuple[float, float] = (0.0, 0.0)

    def enter(self, name: str) -> None:
        """A part begins."""
        self._account()
        self._path = (*self._path, name)
        self.used.setdefault(self._path, PartUse()).calls += 1

    def leave(self) -> None:
        """The innermost part ends."""
        self._account()
        self._path = self._path[:-1]

    def _account(self) -> None:
        """What was taken since the last boundary belongs to the innermost part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now, peak = (time.perf_counter(), time.process_time()), peak_memory(self.device)
        if self._path:
            use = self.used[self._path]
            use.seconds += now[0] - self._since[0]
            use.cpu_seconds += now[1] - self._since[1]
            use.peak_memory_bytes = max(use.peak_memory_bytes, peak)
            if self.device.type == "cpu":
                now_held = resident()
                use.own_memory_bytes = max(use.own_memory_bytes, now_held["RssAnon"])
                mapped = now_held["RssFile"] + now_held["RssShmem"]
                use.mapped_memory_bytes = max(use.mapped_memory_bytes, mapped)
        forget_peak(self.device)
        self._since = time.perf_counter(), time.process_time()


def peak_memory(device: torch.device) -> int:
    """Most bytes in use since `forget_peak`; 0 where that cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident()["VmHWM"]


def resident() -> dict[str, int]:
    """Bytes of the process in memory now and at most, by the kernel's names; 0 where the system does not tell."""
    found = dict.fromkeys(("VmHWM", "RssAnon", "RssFile", "RssShmem"), 0)
    if _STATUS.exists():
        for line in _STATUS.read_text("ascii").splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0]) * 1024
    return found


def forget_peak(device: torch.device) -> None:
    """From here on `peak_memory` counts anew, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text(_RESET_PEAK, "ascii")
    except OSError:  # no Linux, or not allowed: peaks are then those of the process so far
        return
