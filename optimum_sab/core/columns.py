"""What goes from column to column: plain torch, or something faster that gives the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from optimum_sab.core.descent import SweptBlock, sweep_block
from optimum_sab.core.feedback import column_feedback
from optimum_sab.core.trellis import Search, search_bits

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from optimum_sab.core.planes import BlockFit


class Feedback(Protocol):
    """`column_feedback`, or what gives the same."""

    def __call__(
        self,
        weight: Float[Tensor, "out width"],
        fit: BlockFit,
        inverse_factor: Float[Tensor, "width width"],
        base_planes: int,
    ) -> Float[Tensor, "out width"]: ...


@dataclass(frozen=True)
class ColumnLoops:
    """The loops of the solver whose steps need those before.

    Attributes:
        feedback: of one block.
        sweep: of the sign descent, of one block.
        search: of the bits of a coded plane, of any columns; only this one may round otherwise.
    """

    feedback: Feedback
    sweep: Callable[[SweptBlock], None]
    search: Search


IN_TORCH = ColumnLoops(column_feedback, sweep_block, search_bits)
"""On any device."""
