"""The solver's loops over columns in C (columns.c), bit for bit what torch gives."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.columns import IN_TORCH, ColumnLoops
from optimum_sab.core.descent import SweptBlock
from optimum_sab.core.factorization import factor_hessian
from optimum_sab.core.feedback import LevelPicker
from optimum_sab.core.planes import BlockFit, WeightFit
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import warn
from optimum_sab.ops.cpu.compiler import Build, Library, attempted, compile_library
from optimum_sab.ops.cpu.trellis import search_on_cpu

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Path(__file__).with_name("columns.c")
# torch rounds what its vectors leave over at a row's end otherwise than the rest; its widest take so many at once
ROWS = 32


class _Block(ctypes.Structure):
    """`block_t` of columns.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "base_planes", "planes")),
        *((name, ctypes.c_void_p) for name in ("row_scale", "base_levels", "levels", "column_scale", "salient")),
        ("coupling", ctypes.c_void_p),
        ("coupling_stride", ctypes.c_int64),
        ("diagonal", ctypes.c_void_p),
    ]


class _Signs(ctypes.Structure):
    """`signs_t` of columns.c."""

    _fields_ = [("plane", ctypes.c_void_p * 4), ("stride", ctypes.c_int64)]


def loops_on_cpu() -> ColumnLoops:
    """What goes from column to column on a CPU: C where it can be compiled, else torch; the result is one.

    Torch also has weights whose rows are no multiple of `ROWS`. Warns, once, where there is no C.
    """
    if _build().library is None:
        return replace(IN_TORCH, search=search_on_cpu)
    return ColumnLoops(_feedback, _sweep, search_on_cpu)


@lru_cache(maxsize=1)
def _build() -> Build:
    """The process's one attempt."""
    build = attempted(build_columns)
    if build.library is None:
        warn(f"quantizing takes longer than it must, its loops over columns run in torch: {build.reason}.")
    return build


def build_columns(extra: tuple[str, ...] = ()) -> Build:
    """Compile, or take from the cache, and compare with torch; see `compile_library`.

    Some builds of torch round a product before they add it, others do not.
    """
    for rounding in ("-DSAB_FUSED=1", "-DSAB_FUSED=0"):
        build = compile_library((*extra, rounding), (SOURCE,), _declare)
        if build.library is None or _agrees(build.library):
            return build
    return Build(None, "the loops in C round otherwise than this build of torch")


def _declare(library: Library) -> None:
    pointer, integer, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.sab_feedback.argtypes = [pointer, pointer, pointer, pointer, integer]
    library.sab_descend.argtypes = [pointer, pointer, pointer, pointer, wide, pointer, integer]


def _feedback(weight: Tensor, fit: BlockFit, inverse_factor: Tensor, base_planes: int) -> Tensor:
    library = _build().library
    if library is None or weight.shape[0] % ROWS:
        return IN_TORCH.feedback(weight, fit, inverse_factor, base_planes)
    return feed_back(library, weight, fit, inverse_factor, base_planes)


def _sweep(block: SweptBlock) -> None:
    library = _build().library
    if library is None or block.value.shape[0] % ROWS:
        IN_TORCH.sweep(block)
    else:
        sweep(library, block)


def feed_back(library: ctypes.CDLL, weight: Tensor, fit: BlockFit, inverse_factor: Tensor, base_planes: int) -> Tensor:
    """`column_feedback` of float32 on the CPU, with a library of `build_columns`."""
    weight, fit.sign = weight.contiguous(), fit.sign.contiguous()
    picker = LevelPicker(fit.row_scale, base_planes)
    described = _Described(picker, fit.column_scale, fit.salient, -inverse_factor, inverse_factor.diagonal())
    errors = weight.new_empty(weight.shape[1], weight.shape[0])
    signs = _signs(list(fit.sign), weight.shape[1])
    _check(
        library.sab_feedback(
            ctypes.byref(described.block),
            weight.data_ptr(),
            errors.data_ptr(),
            ctypes.byref(signs),
            torch.get_num_threads(),
        )
    )
    return errors.T


def sweep(library: ctypes.CDLL, block: SweptBlock) -> None:
    """`sweep_block` of float32 on the CPU, with a library of `build_columns`."""
    fit, (start, end) = block.fit, block.bounds
    picker = LevelPicker(fit.row_scale[:, block.index], fit.settings.base_planes)
    local = block.hessian[start:end, start:end]
    described = _Described(picker, fit.column_scale[start:end], fit.salient[start:end], local, local.diagonal())
    gradient = block.gradient.contiguous()
    columns = [each[:, start:end] for each in (block.value, block.error)]
    signs = _signs([sign[:, start:end] for sign in fit.signs], fit.signs[0].stride(0))
    _check(
        library.sab_descend(
            ctypes.byref(described.block),
            gradient.data_ptr(),
            *(each.data_ptr() for each in columns),
            block.value.stride(0),
            ctypes.byref(signs),
            torch.get_num_threads(),
        )
    )


class _Described:
    """A block as C reads it, and the memory it points into.

    Args:
        picker: of its levels.
        column_scale: c [width].
        salient: bool [width].
        coupling: what a column does to later ones, [width, width].
        diagonal: by which errors or gradients are divided, [width].
    """

    def __init__(
        self, picker: LevelPicker, column_scale: Tensor, salient: Tensor, coupling: Tensor, diagonal: Tensor
    ) -> None:
        planes, rows = picker.row_scale.shape
        base = picker.base_planes
        self._kept = {
            "row_scale": picker.row_scale[0].contiguous(),
            "base_levels": picker.levels[base].contiguous(),
            "levels": picker.levels[planes].contiguous(),
            "column_scale": column_scale.contiguous(),
            "salient": salient.contiguous(),
            "coupling": coupling if coupling.stride(1) == 1 else coupling.contiguous(),
            "diagonal": diagonal.contiguous(),
        }
        pointers = {name: tensor.data_ptr() for name, tensor in self._kept.items()}
        stride = self._kept["coupling"].stride(0)
        self.block = _Block(
            rows=rows, width=len(column_scale), base_planes=base, planes=planes, coupling_stride=stride, **pointers
        )


def _signs(planes: list[Tensor], stride: int) -> _Signs:
    signs = _Signs(stride=stride)
    for index, plane in enumerate(planes):
        signs.plane[index] = plane.data_ptr()
    return signs


def _check(status: int) -> None:
    if status:
        raise MemoryError("no memory for the scratch of the loops over columns; free some.")


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether C and torch give the same bits on small random blocks, one plane and more, ragged panels."""
    for seed, (base, residual) in enumerate(((1, 0), (1, 1), (2, 1))):
        generator = torch.Generator().manual_seed(seed)
        rows, width, planes = 3 * ROWS, 70, base + residual
        inputs = torch.randn(100, width, generator=generator)
        factored = factor_hessian(inputs.T @ inputs, 0.1)
        weight = torch.randn(rows, width, generator=generator)
        settings = LayerSettings(block_size=32, base_planes=base, residual_planes=residual)
        salient = torch.arange(width) % 5 == 1
        scale = torch.rand(planes, 3, rows, generator=generator) + 0.1
        column = torch.rand(width, generator=generator) + 0.5
        fits = [BlockFit(scale[:, 0], column, torch.zeros(planes, rows, width), salient) for _ in range(2)]
        errors = feed_back(library, weight, fits[0], factored.inverse_factor, base)
        expected = IN_TORCH.feedback(weight, fits[1], factored.inverse_factor, base)
        if not (torch.equal(errors, expected) and torch.equal(fits[0].sign, fits[1].sign)):
            return False
        value = torch.randn(rows, width, generator=generator)
        swept = []
        for run in (IN_TORCH.sweep, lambda block: sweep(library, block)):
            fit = WeightFit([torch.zeros(rows, width) for _ in range(planes)], salient, scale, column, settings)
            error = weight - value
            for index in range(3):
                block = SweptBlock(fit, index, torch.empty(0), value, error, factored.hessian)
                start, end = block.bounds
                run(SweptBlock(fit, index, error @ factored.hessian[:, start:end], value, error, factored.hessian))
            swept.append((*fit.signs, error))
        if not all(map(torch.equal, *swept)):
            return False
    return True
