"""Whether the work can fit at all, said before a weight is read: the one place that refuses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optimum_sab.calibration.plan.limits import Room
from optimum_sab.calibration.plan.memory import memory_of
from optimum_sab.calibration.plan.remedies import remedy
from optimum_sab.calibration.plan.workload import Workload
from optimum_sab.errors import ConfigError
from optimum_sab.wording import size_in_words

ALL_THE_SAME = "ignore_plan=True begins all the same"


@dataclass(frozen=True)
class DiskUse:
    """What will lie in a folder.

    Attributes:
        name: what it is.
        folder: where.
        bytes: expected, beside what is there already.
        free: bytes on its disk.
        setting: what asks for it.
        certain: of the bytes, that it cannot be less than.
    """

    name: str
    folder: str
    bytes: int
    free: int
    setting: str
    certain: int = 0


def refuse_what_cannot_fit(work: Workload, rooms: Mapping[str, Room], disks: Sequence[DiskUse] = ()) -> None:
    """Refuse work of which what is certainly needed at once is more than there is. What may fit is not refused.

    Args:
        work: the run.
        rooms: of `MACHINE` and `ACCELERATOR`.
        disks: what will be written, but for the output.

    Raises:
        ConfigError: with what is needed, what there is, and the setting that would make it fit.
    """
    for memory in memory_of(work):
        room, needed = rooms.get(memory.device), memory.certain
        if room is None or room.total is None or needed.certain <= room.total:
            continue
        parts = needed.largest(lambda part: part.certain)
        free = "" if room.free is None else f", {size_in_words(room.free)} of it free"
        raise ConfigError(
            f"quantizing needs at least {size_in_words(needed.certain)} of {memory.device} at once ({parts}), and "
            f"there are {size_in_words(room.total)} ({room.words}{free}). "
            f"{remedy(work, memory.device, room.total, or_certain=True)} `optimum-sab plan` shows all parts; "
            f"{ALL_THE_SAME}."
        )
    for folder, uses in by_folder([disk for disk in disks if disk.certain]).items():
        size, names = sum(use.certain for use in uses), " and ".join(use.name for use in uses)
        if size > uses[0].free:
            raise ConfigError(
                f"{names} take at least {size_in_words(size)} in {folder!r}, whose disk has "
                f"{size_in_words(uses[0].free)} free; name a folder on another disk, or leave out "
                f"{' or '.join(use.setting for use in uses)}. {ALL_THE_SAME}."
            )


def by_folder(disks: Sequence[DiskUse]) -> dict[str, list[DiskUse]]:
    """What will lie in the same folder, together."""
    found: dict[str, list[DiskUse]] = {}
    for disk in disks:
        found.setdefault(disk.folder, []).append(disk)
    return found
