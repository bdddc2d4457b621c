"""The trellis search in C (trellis.c): what `search_bits` gives, but for rounding."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.code import Code
from optimum_sab.core.trellis import (
    AT_ONCE,
    LOST,
    STRIDE,
    Ends,
    Levels,
    first_state,
    search_bits,
    step_signs,
    whole_rows,
)
from optimum_sab.errors import warn
from optimum_sab.ops.cpu.compiler import Build, Library, attempted, compile_library

if TYPE_CHECKING:
    from torch import Tensor

STATES = 16  # of trellis.c
SOURCE = Path(__file__).with_name("trellis.c")
FUSED = ("-ffp-contract=fast",)  # nothing else has to come to the same bits


class _Search(ctypes.Structure):
    """`search_t` of trellis.c."""

    _fields_ = [
        *[(n, ctypes.c_int32) for n in ("rows", "width", "blocks", "derived", "free", "capacity", "tail")],
        *[(n, ctypes.c_void_p) for n in ("lower", "column", "block", "count", "scale", "sign", "forced")],
        *[(n, ctypes.c_void_p) for n in ("rest", "cost", "history", "choice")],
    ]


def search_on_cpu(
    target: Tensor, inverse_factor: Tensor, levels: Levels, code: Code, ends: Ends | None = None
) -> Tensor:
    """`search_bits` on the CPU: codes of 16 states in C where it can be compiled; warns, once, where it cannot."""
    library = _build().library if code.states == STATES else None
    if library is None:
        return search_bits(target, inverse_factor, levels, code, ends)
    return search_with(
        library, target, inverse_factor, levels, code, ends or whole_rows(len(target), code.memory, target.device)
    )


def search_with(
    library: Library, target: Tensor, inverse_factor: Tensor, levels: Levels, code: Code, ends: Ends
) -> Tensor:
    """The same with a library of `build_trellis`, of a code of 16 states."""
    rows, width = target.shape
    assert code.states == STATES
    derived, states, free = len(code.taps), code.states, levels.row_scale.shape[0] - 1
    capacity = width if width <= AT_ONCE else 2 * STRIDE
    rest = target.float().clone().contiguous()
    cost = torch.full((rows, states), LOST)
    cost.scatter_(1, first_state(ends)[:, None] & (states - 1), 0.0)
    scale = torch.cat([*(levels.row_scale[:1] * part for part in code.parts), levels.row_scale[1:]])
    tensors = {
        "lower": inverse_factor.float().T.contiguous(),
        "column": levels.column_scale.float().contiguous(),
        "block": levels.block.int().contiguous(),
        "count": levels.free.int().contiguous(),
        "scale": scale.float().contiguous(),
        "sign": step_signs(code).contiguous(),
        "forced": ends.after.to(torch.uint8).contiguous(),
        "rest": rest,
        "cost": cost,
        "history": torch.zeros(rows, capacity, states),
        "choice": torch.zeros(1 + free, rows, width, dtype=torch.int64),
    }
    sizes = (rows, width, levels.row_scale.shape[1], derived, free, capacity, ends.after.shape[1])
    problem = ctypes.byref(_Search(*sizes, *(tensor.data_ptr() for tensor in tensors.values())))
    threads = torch.get_num_threads()
    held = next_column = 0
    while next_column < width:
        count = min(capacity - held, width - next_column)
        library.sab_trellis_advance(problem, next_column, count, held, threads)
        next_column, held = next_column + count, held + count
        if next_column < width:
            settled = slice(next_column - held, next_column - held + STRIDE)
            errors = torch.empty(rows, STRIDE)
            library.sab_trellis_settle(problem, next_column, held, STRIDE, errors.data_ptr(), threads)
            rest[:, next_column:].addmm_(errors, inverse_factor[settled, next_column:], alpha=-1.0)
            held -= STRIDE
    bits = torch.empty(rows, width, dtype=torch.uint8)
    library.sab_trellis_trace(problem, bits.data_ptr(), threads)
    return bits


def build_trellis(extra: tuple[str, ...] = ()) -> Build:
    """Compile, or take from the cache; see `compile_library`."""
    return compile_library((*FUSED, *extra), (SOURCE,), _declare)


@lru_cache(maxsize=1)
def _build() -> Build:
    """The process's one attempt."""
    build = attempted(build_trellis)
    if build.library is None:
        warn(f"coded planes take much longer than they must, their search runs in torch: {build.reason}.")
    return build


def _declare(library: Library) -> None:
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.sab_trellis_advance.argtypes = [pointer, integer, integer, integer, integer]
    library.sab_trellis_settle.argtypes = [pointer, integer, integer, integer, pointer, integer]
    library.sab_trellis_trace.argtypes = [pointer, pointer, integer]
