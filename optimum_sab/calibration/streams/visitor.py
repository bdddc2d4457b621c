"""What the lockstep calls at every block, and what it shows there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from optimum_sab.calibration.streams.arrival import Arrival
from optimum_sab.calibration.streams.experts import ExpertLinears, RoutedArrival


class Visitor(Protocol):
    """What the scheduler calls for every block: `enter`, `solve` per group of linears, perhaps `miss`, and `leave`.

    `solve_experts` in the place of `solve` where the linears are those of experts.
    """

    def enter(self, index: int) -> None: ...

    def solve(self, names: tuple[str, ...], arrivals: Sequence[Arrival]) -> Mapping[str, Tensor]:
        """Binarize the linears that share an input; returns the weight each quantized stream goes on with."""
        ...

    def solve_experts(self, linears: ExpertLinears, arrivals: Sequence[RoutedArrival]) -> Mapping[str, Tensor]:
        """Binarize the experts' linears of one name; returns the weights as `solve` does, of all of them."""
        ...

    def miss(self, names: Sequence[str]) -> None:
        """Called before `leave` with the linears of the block that no token reached, where there are any."""
        ...

    def leave(self, index: int, drift: float | None) -> None: ...
