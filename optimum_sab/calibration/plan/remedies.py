"""Settings that would make work fit, those first that cost least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from optimum_sab.calibration.plan.memory import ACCELERATOR, DeviceMemory, memory_of
from optimum_sab.calibration.plan.workload import SampleSizes, Workload
from optimum_sab.wording import size_in_words


def remedy(work: Workload, device: str, room: int, held: Callable[[DeviceMemory], int]) -> str:
    """The first change of settings with which what is held finds room, in a sentence.

    Args:
        work: the run.
        device: `MACHINE` or `ACCELERATOR`.
        room: bytes that there are.
        held: bytes of a device that count.
    """
    for words, changed in _changes(work):
        size = sum(held(each) for each in memory_of(changed) if each.device == device)
        if size <= room:
            return f"With {words} it is {size_in_words(size)}."
    if device == ACCELERATOR:
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
