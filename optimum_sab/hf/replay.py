"""Calibration data that can be gone through only once, kept so that a configuration can be used again."""

from __future__ import annotations

import io
from collections.abc import Iterator
from threading import Lock
from typing import Any

from optimum_sab.errors import SampleError


class Replay:
    """What an iterator gives, as often as it is asked for: what was given once is remembered.

    Args:
        source: taken from only as far as somebody goes.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._seen: list[Any] = []
        self._failure: BaseException | None = None
        self._lock = Lock()

    def __iter__(self) -> Iterator[Any]:
        place = 0
        while self._has(place):
            yield self._seen[place]
            place += 1

    def _has(self, place: int) -> bool:
        with self._lock:
            if place < len(self._seen):
                return True
            if self._failure is not None:  # an iterator that has failed looks like one that is at its end
                raise SampleError(
                    f"the {type(self._source).__name__} that was given as calibration has failed before "
                    f"({self._failure!r}); give a new one."
                ) from self._failure
            try:
                self._seen.append(next(self._source))
            except StopIteration:
                return False
            except BaseException as error:
                self._failure = error
                raise
        return True


def replayed(data: Any) -> Any:
    """The data itself, or a `Replay` of it where it can be gone through only once."""
    is_once = isinstance(data, Iterator) and not isinstance(data, io.IOBase)  # of a file its lines are no samples
    return Replay(data) if is_once else data
