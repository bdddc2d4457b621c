"""A linear that is solved, as one rank gives it to the others."""

from __future__ import annotations

from dataclasses import dataclass

from optimum_sab.format.packed_weight import PackedWeight


@dataclass(frozen=True)
class Solved:
    """What was found for a linear.

    Attributes:
        packed: its weight.
        error: relative output error of all that were solved with it, as one stack.
    """

    packed: PackedWeight
    error: float
