"""The parts of a long piece of work, for whoever wants to know where its time and memory go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Watch(Protocol):
    """What is told which part begins and ends; parts lie inside each other."""

    def enter(self, name: str) -> None: ...

    def leave(self) -> None: ...


_watch: Watch | None = None


@contextmanager
def part(name: str) -> Iterator[None]:
    """What is done inside is a part of this name; costs next to nothing while nobody watches."""
    watch = _watch
    if watch is None:
        yield
        return
    watch.enter(name)
    try:
        yield
    finally:
        watch.leave()


@contextmanager
def watched_by(watch: Watch) -> Iterator[None]:
    """Inside, ``watch`` is told of every part, of the whole process."""
    global _watch
    before, _watch = _watch, watch
    try:
        yield
    finally:
        _watch = before
