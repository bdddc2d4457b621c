"""Whether the work can fit at all, said before a weight is read: the one place that refuses it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from optimum_sab.calibration.plan.limits import Room
from optimum_sab.calibration.plan.memory import ACCELERATOR, DeviceMemory, memory_of
from optimum_sab.calibration.plan.workload import SampleSizes, Workload
from optimum_sab.errors import ConfigError

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
        parts = ", ".join(
            f"{size_in_words(part.certain)} {part.name}"
            for part in sorted(needed.parts, key=lambda part: -part.certain)[:3]
            if part.certain
        )
        free = "" if room.free is None else f", {size_in_words(room.free)} of it free"
        raise ConfigError(
            f"quantizing needs at least {size_in_words(needed.certain)} of {memory.device} at once ({parts}), and "
            f"there are {size_in_words(room.total)} ({room.words}{free}). {_remedy(work, memory, room.total)} "
            f"`optimum-sab plan` shows all parts; {ALL_THE_SAME}."
        )
    by_folder: dict[str, list[DiskUse]] = {}
    for disk in disks:
        if disk.certain:
            by_folder.setdefault(disk.folder, []).append(disk)
    for folder, uses in by_folder.items():
        size, names = sum(use.certain for use in uses), " and ".join(use.name for use in uses)
        if size > uses[0].free:
            raise ConfigError(
                f"{names} take at least {size_in_words(size)} in {folder!r}, whose disk has "
                f"{size_in_words(uses[0].free)} free; name a folder on another disk, or leave out "
                f"{' or '.join(use.setting for use in uses)}. {ALL_THE_SAME}."
            )


def _remedy(work: Workload, memory: DeviceMemory, total: int) -> str:
    """The first change of settings with which what is certain finds room."""
    for words, changed in _changes(work):
        found = {each.device: each.certain.certain for each in memory_of(changed)}
        if found.get(memory.device, 0) <= total:
            return f"With {words} it is {size_in_words(found.get(memory.device, 0))}."
    if memory.device == ACCELERATOR:
        return "No setting makes it fit; take a device with more memory, or none."
    return "No setting makes it fit; take a machine with more memory."


def _changes(work: Workload) -> Iterator[tuple[str, Workload]]:
    """Settings that take less memory, those first that cost least."""
    machine = work.home == "cpu"
    streamed = replace(work, streamed=True)
    can_stream = machine and not work.streamed and not work.options.source.written
    if machine and work.options.activation_memory is None:
        yield "activation_memory=1", _bounded(work)
    if can_stream:
        yield "stream_weights=True", streamed
        yield "stream_weights=True and activation_memory=1", _bounded(streamed)
    for words, least in (("", work), ("stream_weights=True and ", streamed if can_stream else None)):
        if least is not None:
            yield from _fewer_samples(least, words)


def _bounded(work: Workload) -> Workload:
    return replace(work, options=replace(work.options, activation_memory=2**30))


def _fewer_samples(work: Workload, words: str) -> Iterator[tuple[str, Workload]]:
    count = len(work.samples.tokens) // 2
    while count >= 1:
        yield f"{words}calibration_samples={count}", replace(work, samples=_first(work.samples, count))
        count //= 2


def _first(samples: SampleSizes, count: int) -> SampleSizes:
    return replace(samples, tokens=samples.spread(count), patches=samples.patches * count // len(samples.tokens))


def size_in_words(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"
