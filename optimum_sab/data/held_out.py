"""What is kept for evaluation: every drawn thing has a key, and keys with a certain checksum are reserved."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import TypeVar

RESERVED_MODULUS = 10

Drawn = TypeVar("Drawn")


def is_reserved(key: str) -> bool:
    """Whether what has this key is kept for evaluation: its checksum is a multiple of `RESERVED_MODULUS`."""
    return zlib.crc32(key.encode()) % RESERVED_MODULUS == 0


def draw(
    rng: random.Random,
    generate: Callable[[random.Random], Drawn],
    key: Callable[[Drawn], str],
    reserved: bool,
) -> Drawn:
    """Draw until the key falls on the wanted side of the split.

    Args:
        rng: source of every random choice.
        generate: draws one thing of either side.
        key: what the thing is told apart by.
        reserved: which side is wanted; training takes False, evaluation True.
    """
    while is_reserved(key(drawn := generate(rng))) != reserved:
        pass
    return drawn
