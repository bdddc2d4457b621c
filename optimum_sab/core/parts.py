"""The parts of a long piece of work, for whoever wants to know where its time and memory go."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Watch(Protocol):
    """What is told which part begins and ends; parts lie inside each other."""

    def enter(self, name: str) -> None: ...

    def leave(self) -> None: ...


_watch: Watch | None = None
_watched = 0  # the thread that is watched: parts of several do not lie inside each other


@contextmanager
def part(name: str) -> Iterator[None]:
    """What is done inside is a part of this name; costs next to nothing while nobody watches."""
    watch = _watch
    if watch is None or threading.get_ident() != _watched:
        yield
        return
    watch.enter(name)
    try:
        yield
    finally:
        watch.leave()


@contextmanager
def watched_by(watch: Watch) -> Iterator[None]:
    """Inside, ``watch`` is told of every part of this thread."""
    global _watch, _watched
    before = _watch, _watched
    _watch, _watched = watch, threading.get_ident()
    try:
        yield
    finally:
        _watch, _watched = before
