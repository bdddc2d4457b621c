"""Schedules: the learning rate of every step, from a warm-up to the end."""

from __future__ import annotations

import math

COSINE_FLOOR = 0.01


def linear_rates(peak: float, steps: int, warmup: int, last: float) -> list[float]:
    """The smaller of two lines: from nothing up to the peak in `warmup` steps, and down to a share of it at the end.

    Args:
        peak: learning rate that the schedule multiplies.
        steps: number of optimizer steps, and of rates.
        warmup: steps of linear warm-up.
        last: share of `peak` in the last step.
    """
    return [peak * min(step / max(1, warmup), 1 + last - step / steps) for step in range(1, steps + 1)]


def cosine_rates(peak: float, steps: int, warmup: int) -> list[float]:
    """Linear warm-up to the peak, then a cosine down to a hundredth of it.

    Args:
        peak: the highest learning rate.
        steps: number of optimizer steps, and of rates.
        warmup: steps of linear warm-up.
    """
    return [peak * _cosine_share(step, steps, warmup) for step in range(1, steps + 1)]


def _cosine_share(step: int, steps: int, warmup: int) -> float:
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))
