"""A few of many samples, where all would take too long."""

from __future__ import annotations


def spread(count: int, most: int) -> list[int]:
    """Indices of at most ``most`` of ``count`` samples, evenly spread; the first is always among them."""
    chosen = min(count, most)
    return [index * count // chosen for index in range(chosen)]
