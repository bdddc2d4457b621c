"""Who waits at a linear, and with what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

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


def row_count(inputs: Tensor) -> int:
    """Rows of [..., width]."""
    return inputs.shape[:-1].numel()


def rows_given(call: tuple[tuple[Any, ...], dict[str, Any]]) -> int:
    """Rows of the hidden states a block is called with, which are the first that holds numbers; 0 without any.

    Args:
        call: positional and named arguments.
    """
    args, kwargs = call
    given = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point())
    return next((row_count(t) for t in given), 0)
