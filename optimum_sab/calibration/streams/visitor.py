"""What the lockstep calls at every block, and what it shows there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from optimum_sab.calibration.streams.experts import ExpertLinears, RoutedArrival

DENSE, QUANTIZED = "dense", "quantized"
Worker = tuple[int, str]  # a sample's index and a stream: one coroutine


@dataclass(frozen=True)
class Arrival:
    """One coroutine waiting at a linear.

    Attributes:
        sample: the sample's index.
        stream: `DENSE` or `QUANTIZED`.
        inputs: of the linear, [..., tokens, in].
        residual: what the linear's output will be added to, [..., tokens, out]; None where that is not known, or the
            linear is not the only one with this input.
        entered: rows of hidden states that the block was called with; an expert is given fewer.
        company: samples that came to the block; 0 where that is not known.
        tokens: which of the sample's tokens the rows are of, [rows]; None where they are all, in order.
        keys: by which a row is known in the other stream, [rows], where that is not its token alone.
    """

    sample: int
    stream: str
    inputs: Tensor
    residual: Tensor | None = None
    entered: int = 0
    company: int = 0
    tokens: Tensor | None = None
    keys: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of ``inputs``."""
        return row_count(self.inputs)


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


def row_count(inputs: Tensor) -> int:
    """Rows of [..., width]."""
    return inputs.shape[:-1].numel()
