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
    groups = _groups(meminfo.get("SwapTotal", 0))
    left = [limit - held for limit, held in groups]
    free = min(left if free is None else [free, *left], default=None)
    group = min((limit for limit, _ in groups), default=None)
    if group is not None and group < total:
        return Room(group, None if free is None else max(0, free), "the limit of this control group")
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


def _groups(swap: int) -> list[tuple[int, int]]:
    """Of the control groups around this process: bytes that each allows, with the machine's swap, and what it holds."""
    try:
        lines = _MEMBERSHIP.read_text("utf-8").splitlines()
    except OSError:
        return []
    found = []
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
                    swapping = swap if allowed is None else min(swap, allowed)
                    found.append((limit + swapping, _held(folder, "memory.current")))
        elif "memory" in kinds.split(","):
            for folder in (_CGROUP / "memory" / path.lstrip("/"), _CGROUP / "memory"):
                both = _number(folder / "memory.memsw.limit_in_bytes")
                limit = _number(folder / "memory.limit_in_bytes")
                if both is not None or limit is not None:
                    most = both if both is not None else (limit or 0) + swap
                    found.append((most, _held(folder, "memory.usage_in_bytes")))
    return found


def _held(folder: Path, name: str) -> int:
    """What a group holds, without pages of files, which it can let go of."""
    held = _number(folder / name) or 0
    try:
        lines = (folder / "memory.stat").read_text("ascii").splitlines()
    except OSError:
        return held
    stat = dict(line.split() for line in lines if len(line.split()) == 2)
    return max(0, held - sum(int(stat.get(each, 0)) for each in ("active_file", "inactive_file")))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text("ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
