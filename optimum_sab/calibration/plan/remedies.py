"""Settings that would make work fit, those first that cost least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from optimum_sab.calibration.plan.memory import ACCELERATOR, DeviceMemory, memory_of
from optimum_sab.calibration.plan.workload import Workload
from optimum_sab.wording import size_in_words

BOUND = 2**30  # of activations, that is proposed
FEWEST = 16  # samples that are proposed


def remedy(work: Workload, device: str, room: int, or_certain: bool = False) -> str:
    """The first change of settings with which what is expected finds room, in a sentence.

    All that is held, or, where that cannot be, what is held without what is mapped; else what takes less in general.

    Args:
        work: the run.
        device: `MACHINE` or `ACCELERATOR`.
        room: bytes that there are.
        or_certain: whether a change is named, too, with which only what is certain finds room.
    """
    whole = _first(work, device, room, lambda memory: memory.peak.bytes)
    if whole is not None:
        return f"{whole}."
    own = _first(work, device, room, lambda memory: memory.own)
    if own is not None:
        return f"{own}, mapped weights not counted."
    least = _first(work, device, room, lambda memory: memory.certain.certain) if or_certain else None
    return _otherwise(work, device) if least is None else f"{least.replace(' it is ', ' it is at least ')}."


def _first(work: Workload, device: str, room: int, held: Callable[[DeviceMemory], int]) -> str | None:
    for words, changed in _changes(work):
        size = sum(held(each) for each in memory_of(changed) if each.device == device)
        if size <= room:
            return f"With {words} it is {size_in_words(size)}"
    return None


def _otherwise(work: Workload, device: str) -> str:
    """Where none of the settings is enough."""
    shorter = "Less is taken by shorter samples (sequence_length; the processor's max_pixels for pictures)"
    if device != ACCELERATOR:
        return f"{shorter}; else it takes a machine with more memory."
    if work.home == "cpu":
        return f"{shorter}; else it takes a device with more memory, or none."
    return (
        f"{shorter}, or by device_map='cpu' with the device as calibration_device, which then holds one decoder block "
        "at a time; else it takes a device with more memory, or none."
    )


def _changes(work: Workload) -> Iterator[tuple[str, Workload]]:
    """Settings that take less memory, those first that cost least."""
    machine = work.home == "cpu"
    streamed = replace(work, streamed=True)
    can_stream = machine and work.streamable and not work.streamed and not work.options.source.written
    room = work.options.activation_memory
    can_bound = machine and (room is None or room > BOUND)
    if can_bound:
        yield "activation_memory=1", _bounded(work)
    if can_stream:
        yield "stream_weights=True", streamed
        if can_bound:
            yield "stream_weights=True and activation_memory=1", _bounded(streamed)
    for words, least in (("", work), ("stream_weights=True and ", streamed if can_stream else None)):
        if least is not None:
            yield from _fewer_samples(least, words)
    chosen = work.options.allocation
    if chosen is not None and chosen.target_bits is None:  # its backward pass keeps a sample's whole graph
        uniform = replace(work, options=replace(work.options, allocation=None))
        yield "allocation='uniform'", uniform
        if can_bound:
            yield "allocation='uniform' and activation_memory=1", _bounded(uniform)
        if can_stream:
            yield "allocation='uniform' and stream_weights=True", replace(uniform, streamed=True)
            if can_bound:
                both = replace(_bounded(uniform), streamed=True)
                yield "allocation='uniform', stream_weights=True and activation_memory=1", both


def _bounded(work: Workload) -> Workload:
    return replace(work, options=replace(work.options, activation_memory=BOUND))


def _fewer_samples(work: Workload, words: str) -> Iterator[tuple[str, Workload]]:
    """Halves, down to what still calibrates a model."""
    mixed = work.options.source.builtin
    count = len(work.samples.tokens) // 2
    while count >= FEWEST and count > mixed:
        fewer = replace(work, samples=work.samples.first(count, mixed))
        yield f"{words}calibration_samples={count * work.ranks}", fewer
        count //= 2
