"""What ranks leave for each other in the store when one is gone, and who leaves nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

LAST_WORDS = 3.0  # seconds in which ranks that are still there say so


def leave_words(store: Any, rank: int, words: str) -> None:
    """Leave what the others are to read; nothing where the store is gone.

    Args:
        store: all ranks'.
        rank: of this process.
        words: why it stops; "" where it is only still there.
    """
    _Talk(store, rank, words, ()).ended(LAST_WORDS)


def last_words(store: Any, rank: int, size: int) -> tuple[list[int], tuple[int, str] | None]:
    """Say that this rank is still there, and hear the others.

    Args:
        store: all ranks'.
        rank: of this process.
        size: how many there are.

    Returns:
        The ranks of which nothing was heard within `LAST_WORDS`, or rank 0 where the store has gone; and one that has
        stopped with what it says, if any.
    """
    talk = _Talk(store, rank, "", [other for other in range(size) if other != rank])
    talk.ended(LAST_WORDS)
    return talk.missing, talk.said


class _Talk:
    """With the store, in a thread of its own: one that a dead network leads to never answers, nor fails."""

    def __init__(self, store: Any, rank: int, words: str, others: Sequence[int]) -> None:
        self._store, self._rank, self._words = store, rank, words
        self.missing = list(others)
        self.said: tuple[int, str] | None = None
        self._end = time.monotonic() + LAST_WORDS
        self._thread = threading.Thread(target=self._run, name="last words", daemon=True)
        self._thread.start()

    def ended(self, seconds: float) -> None:
        """Wait for its end, at most so long."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._talk()
        except RuntimeError:
            self.missing = [0]  # which holds the store, where no launcher does

    def _talk(self) -> None:
        self._store.set(f"gone/{self._rank}", self._words)
        while self.missing and time.monotonic() < self._end:
            for other in list(self.missing):
                if self._store.check([f"gone/{other}"]):
                    self.missing.remove(other)
                    words = self._store.get(f"gone/{other}").decode()
                    if words and self.said is None:
                        self.said = other, words
            time.sleep(0.05)
