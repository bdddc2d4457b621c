"""How a step of the calibration says how far it is."""

from __future__ import annotations

from collections.abc import Callable

OnStep = Callable[[int, int], None]
"""``(done, total)`` of one stage; the total may grow."""


def no_step(done: int, total: int) -> None:
    """For those who do not want to know."""
