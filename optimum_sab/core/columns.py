"""What goes from column to column: plain torch, or something faster that gives the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from optimum_sab.core.descent import SweptBlock, sweep_block
from optimum_sab.core.feedback import column_feedback
from optimum_sab.core.trellis import Search, search_bits

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from optimum_sab.core.planes import BlockFit


class Feedback(Protocol):
    """`column_feedback`, or what gives the same; a stack of weights where `ColumnLoops.stacks`."""

    def __call__(
        self,
        weight: Float[Tensor, "... out width"],
        fit: BlockFit,
        inverse_factor: Float[Tensor, "... width width"],
        base_planes: int,
    ) -> Float[Tensor, "... out width"]: ...


@dataclass(frozen=True)
class ColumnLoops:
    """The loops of the solver whose steps need those before.

    Attributes:
        feedback: of one block.
        sweep: of the sign descent, of one block.
        search: of the bits of a coded plane, of any columns; only this one may round otherwise.
        stacks: whether ``feedback`` and ``sweep`` take a stack of weights at once.
    """

    feedback: Feedback
    sweep: Callable[[SweptBlock], None]
    search: Search
    stacks: bool = False

    def feed_back(
        self,
        weight: Float[Tensor, "... out width"],
        fit: BlockFit,
        inverse_factor: Float[Tensor, "... width width"],
        base_planes: int,
    ) -> Float[Tensor, "... out width"]:
        """``feedback`` of a block of one weight or of a stack, whose weights take turns where it takes only one."""
        if weight.ndim == 2 or self.stacks:
            return self.feedback(weight, fit, inverse_factor, base_planes)
        errors = torch.empty_like(weight)
        for index in range(len(weight)):
            own = fit.of(index)
            errors[index] = self.feedback(weight[index], own, inverse_factor[index], base_planes)
            fit.sign[:, index] = own.sign
        return errors

    def descend(self, block: SweptBlock) -> None:
        """``sweep`` of a block, in the same way."""
        if block.value.ndim == 2 or self.stacks:
            self.sweep(block)
            return
        for index in range(len(block.value)):
            self.sweep(block.of(index))


IN_TORCH = ColumnLoops(column_feedback, sweep_block, search_bits)
"""On any device."""
