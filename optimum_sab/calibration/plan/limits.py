"""What a machine and its accelerator have: in all, and free."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from optimum_sab.calibration.streams.memory import free_memory

_CGROUP, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Room:
    """Memory of a device.

    Attributes:
        total: bytes that nothing can exceed: memory and swap, or what the process's group may have; None where that
            cannot be asked.
        free: bytes that can still be had now; None where that cannot be asked.
        words: what sets the limit.
    """

    total: int | None
    free: int | None
    words: str


def machine_room() -> Room:
    """Of this machine: its memory and swap, or the limit of the control group that this process is in."""
    meminfo = _meminfo()
    memory = meminfo.get("MemTotal") or _physical()
    free = free_memory(torch.device("cpu"))
    if free is None:
        free = meminfo.get("MemAvailable")
    if memory is None:
        return Room(None, free, "unknown")
    total = memory + meminfo.get("SwapTotal", 0)
    group = _group_limit(meminfo.get("SwapTotal", 0))
    if group is not None and group < total:
        return Room(group, free if free is None else min(free, group), "the limit of this control group")
    return Room(total, free, "memory and swap" if meminfo.get("SwapTotal") else "memory")


def accelerator_room(device: torch.device) -> Room:
    """Of an accelerator."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return Room(total, free_memory(device), str(device))


def process_bytes() -> int | None:
    """Memory that this process holds; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _meminfo() -> dict[str, int]:
    try:
        lines = _MEMINFO.read_text("ascii").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, _, rest = line.partition(":")
        number = rest.split()
        if number and number[0].isdigit():
            found[name] = int(number[0]) * 1024
    return found


def _physical() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has none of it
        return None


def _group_limit(swap: int) -> int | None:
    """Bytes that the control groups around this process allow, with the machine's swap; None without a limit."""
    try:
        lines = _MEMBERSHIP.read_text("utf-8").splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if not kinds:  # version 2: every group above counts too
            own = _CGROUP / path.lstrip("/")
            for folder in (own, *own.parents):
                if folder == _CGROUP.parent:
                    break
                limit = _number(folder / "memory.max")
                if limit is not None:
                    allowed = _number(folder / "memory.swap.max")
                    limits.append(limit + (swap if allowed is None else min(swap, allowed)))
        elif "memory" in kinds.split(","):
            for folder in (_CGROUP / "memory" / path.lstrip("/"), _CGROUP / "memory"):
                both = _number(folder / "memory.memsw.limit_in_bytes")
                limit = _number(folder / "memory.limit_in_bytes")
                limits += [both] if both is not None else [] if limit is None else [limit + swap]
    return min(limits, default=None)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text("ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
