"""A tenth of the samples judges what the rest trains."""

from __future__ import annotations

from dataclasses import dataclass

HELD_OUT = 10  # one in ten


@dataclass(frozen=True)
class Split:
    """Indices of samples: those that give gradients, and those that only judge."""

    train: tuple[int, ...]
    judge: tuple[int, ...]


def split_samples(count: int) -> Split:
    """Every tenth sample judges, one at least; a lone sample has to do both."""
    if count == 1:
        return Split((0,), (0,))
    judge = range(HELD_OUT - 1, count, HELD_OUT) if count >= HELD_OUT else (count - 1,)
    return Split(tuple(i for i in range(count) if i not in set(judge)), tuple(judge))
