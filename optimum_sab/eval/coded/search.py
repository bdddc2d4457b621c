"""The best stored bits of many rows at once: a trellis search whose survivors carry their own error feedback."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.code import Code
from optimum_sab.eval.coded.library import load_search

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
    from torch import Tensor

STRIDE = 32  # columns that are settled at a time, when as many more have been searched
AT_ONCE = 128  # a row of at most so many columns is searched before any are settled
LOST = 1e30


@dataclass(frozen=True)
class Levels:
    """What the columns of a search can take: ``c[j] (Σ_q a[q] P_q[j] + Σ_f ± a[D + f])``.

    Attributes:
        row_scale: a [derived and free planes, blocks, out].
        column_scale: c [in].
        block: which block's row scales a column has, [in].
        free: how many free planes a column has, [in]: the first ones.
    """

    row_scale: Float[Tensor, "planes blocks out"]
    column_scale: Float[Tensor, " in"]
    block: Int[Tensor, " in"]
    free: Int[Tensor, " in"]

    def columns(self, start: int, end: int) -> Levels:
        """Of some columns."""
        part = slice(start, end)
        return Levels(self.row_scale, self.column_scale[part], self.block[part], self.free[part])


@dataclass(frozen=True)
class Ends:
    """What is fixed around the columns of a search.

    Attributes:
        before: stored bits of the ``memory`` columns before, [out, memory]; 0 where the row begins.
        after: stored bits of the last columns of the search itself, [out, tail].
    """

    before: Bool[Tensor, "out memory"]
    after: Bool[Tensor, "out tail"]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        bits: bit 0 is the stored bit u, bit 1 + f the sign of free plane f.
        error: ``(t − q) H (t − q)ᵀ`` of every row, fp64.
    """

    bits: UInt8[Tensor, "out in"]
    error: Float[Tensor, " out"]


class _Search(ctypes.Structure):
    _fields_ = [
        *[(n, ctypes.c_int32) for n in ("rows", "width", "states", "blocks", "derived", "free", "capacity", "tail")],
        *[(n, ctypes.c_void_p) for n in ("lower", "column", "block", "count", "scale", "sign", "forced")],
        *[(n, ctypes.c_void_p) for n in ("rest", "cost", "history", "paid", "choice")],
    ]


def search_bits(
    target: Float[Tensor, "out in"],
    inverse_factor: Float[Tensor, "in in"],
    levels: Levels,
    code: Code,
    ends: Ends | None = None,
) -> Found:
    """Bits that make ``(t − q) H (t − q)ᵀ`` of every row small, with one survivor per state of the code.

    Args:
        target: T.
        inverse_factor: upper triangular U with ``Uᵀ U = H⁻¹``.
        levels: what can be chosen.
        code: how the derived planes are made.
        ends: what is fixed; None for whole rows.

    Raises:
        MissingDependencyError: see `load_search`.
    """
    library = load_search()
    rows, width = target.shape
    derived, states = len(code.taps), code.states
    free = levels.row_scale.shape[0] - derived
    capacity = width if width <= AT_ONCE else 2 * STRIDE
    rest = target.float().clone().contiguous()
    cost = torch.full((rows, states), LOST)
    start = torch.zeros(rows, dtype=torch.int64)
    forced = torch.zeros(rows, 0, dtype=torch.uint8)
    if ends is not None:
        for k in range(ends.before.shape[1]):
            start |= ends.before[:, -1 - k].long() << k
        forced = ends.after.to(torch.uint8).contiguous()
    cost[torch.arange(rows), start & (states - 1)] = 0.0
    tensors = {
        "lower": inverse_factor.float().T.contiguous(),
        "column": levels.column_scale.float().contiguous(),
        "block": levels.block.int().contiguous(),
        "count": levels.free.int().contiguous(),
        "scale": levels.row_scale.float().contiguous(),
        "sign": code.step_signs().contiguous(),
        "forced": forced,
        "rest": rest,
        "cost": cost,
        "history": torch.zeros(rows, capacity, states),
        "paid": torch.zeros(rows, dtype=torch.float64),
        "choice": torch.zeros(1 + free, rows, width, dtype=torch.int64),
    }
    sizes = (rows, width, states, levels.row_scale.shape[1], derived, free, capacity, forced.shape[1])
    problem = ctypes.byref(_Search(*sizes, *(tensor.data_ptr() for tensor in tensors.values())))
    held = next_column = 0
    while next_column < width:
        count = min(capacity - held, width - next_column)
        library.coded_advance(problem, next_column, count, held)
        next_column, held = next_column + count, held + count
        if next_column < width:
            settled = slice(next_column - held, next_column - held + STRIDE)
            errors = torch.empty(rows, STRIDE)
            library.coded_settle(problem, next_column, held, STRIDE, errors.data_ptr())
            rest[:, next_column:].addmm_(errors, inverse_factor[settled, next_column:], alpha=-1.0)
            held -= STRIDE
    bits = torch.empty(rows, width, dtype=torch.uint8)
    library.coded_trace(problem, bits.data_ptr())
    return Found(bits, tensors["paid"])
