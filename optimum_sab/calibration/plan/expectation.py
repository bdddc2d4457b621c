"""Whether what a run is expected to take is free, said before a weight is read: the one place that warns of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum

from optimum_sab.calibration.plan.fit import DiskUse, by_folder
from optimum_sab.calibration.plan.limits import Room
from optimum_sab.calibration.plan.memory import DeviceMemory, Phase, memory_of
from optimum_sab.calibration.plan.remedies import remedy
from optimum_sab.calibration.plan.workload import Workload
from optimum_sab.wording import size_in_words


class Fit(Enum):
    """How what a run is expected to take stands to what is free of a device's memory."""

    UNKNOWN = "not known"
    FITS = "fits"
    TIGHT = "tight"
    """Only if the system lets go of mapped weights, and reads them again."""
    NOT = "does not fit"


def fit_of(memory: DeviceMemory, room: Room | None) -> Fit:
    """Compare the peak with what is free.

    Args:
        memory: what is expected, without what this process holds already.
        room: of the device.
    """
    if room is None or room.free is None:
        return Fit.UNKNOWN
    if memory.peak.bytes <= room.free:
        return Fit.FITS
    return Fit.TIGHT if memory.own <= room.free else Fit.NOT


def shortages(
    work: Workload, rooms: Mapping[str, Room], disks: Sequence[DiskUse] = (), refusing: bool = True
) -> Iterator[str]:
    """What is expected to be short, in sentences with a remedy.

    Args:
        work: the run.
        rooms: of `MACHINE` and `ACCELERATOR`.
        disks: what will be written, but for the output.
        refusing: whether `refuse_what_cannot_fit` is asked too, to which then is left what it refuses.
    """
    for memory in memory_of(work):
        room = rooms.get(memory.device)
        fit = fit_of(memory, room)
        if room is None or room.free is None or fit not in (Fit.TIGHT, Fit.NOT):
            continue
        if refusing and room.total is not None and memory.certain.certain > room.total:
            continue
        tight = fit is Fit.TIGHT
        phase = memory.peak if tight else max(memory.phases, key=lambda each: each.own)
        bound = "" if work.samples.exact else "at most "
        largest = phase.largest(lambda part: part.bytes)
        yield (
            f"quantizing is expected to take {bound}{size_in_words(phase.bytes)} of {memory.device} in the stage "
            f"{phase.name!r} ({largest}), and {size_in_words(room.free)} are free. {_mapped(phase, tight)}"
            f"{remedy(work, memory.device, room.free)}"
        )
    for folder, uses in by_folder(disks).items():
        size, free = sum(use.bytes for use in uses), uses[0].free
        if size > free and not (refusing and sum(use.certain for use in uses) > free):
            yield (
                f"{' and '.join(use.name for use in uses)} are expected to take {size_in_words(size)} in {folder!r}, "
                f"whose disk has {size_in_words(free)} free; name a folder on another disk."
            )


def _mapped(phase: Phase, tight: bool) -> str:
    if not phase.mapped:
        return ""
    size = size_in_words(phase.mapped)
    if tight:
        return (
            f"{size} of it are weights that are mapped from their files: the system lets go of them and reads them "
            "again, so it may go through, at the speed of the disk. "
        )
    return f"Without the {size} of it that the system can let go of and read again it is {size_in_words(phase.own)}. "
