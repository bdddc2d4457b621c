"""The alternating fit of a block in C (block_fit.c): what `fit_block` gives, but for rounding."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.alternating import fit_block, start_fit, with_scale_means
from optimum_sab.core.planes import BlockFit
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import warn
from optimum_sab.ops.cpu.compiler import Build, Library, attempted, compile_library

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Path(__file__).with_name("block_fit.c")
FLAGS = ("-ffp-contract=fast", "-fopenmp-simd", "-fno-trapping-math")  # nothing else has to come to the same bits


class _Fit(ctypes.Structure):
    """`fit_t` of block_fit.c."""

    _fields_ = [
        *[(n, ctypes.c_int64) for n in ("rows", "width", "plain", "base_planes", "planes", "iterations")],
        *[(n, ctypes.c_void_p) for n in ("weight", "significance", "column_scale", "row_scale", "sign")],
    ]


def fit_on_cpu(weight: Tensor, significance: Tensor, salient: Tensor, settings: LayerSettings) -> BlockFit:
    """`fit_block` on the CPU, in C on one thread where it can be compiled; warns, once, where it cannot.

    Torch also has error weights of single entries.
    """
    library = _build().library
    if library is None or significance.shape[0] != 1 or weight.device.type != "cpu":
        return fit_block(weight, significance, salient, settings)
    return fit_with(library, weight, significance, salient, settings)


def fit_with(
    library: Library, weight: Tensor, significance: Tensor, salient: Tensor, settings: LayerSettings
) -> BlockFit:
    """The same with a library of `build_block_fit`."""
    fit = start_fit(weight, significance, salient, settings)
    order = torch.argsort(salient.int(), stable=True)  # salient columns last
    back = torch.argsort(order)
    tensors = {
        "weight": weight.index_select(1, order),
        "significance": significance[0, order],
        "column_scale": fit.column_scale[order],
        "row_scale": fit.row_scale.contiguous(),
        "sign": fit.sign.index_select(2, order),
    }
    plain = weight.shape[1] - int(salient.sum())
    sizes = (*weight.shape, plain, settings.base_planes, settings.planes, settings.iterations)
    if library.sab_fit_block(ctypes.byref(_Fit(*sizes, *(each.data_ptr() for each in tensors.values())))):
        raise MemoryError("no memory for the scratch of a block's fit; free some.")
    sign = tensors["sign"].index_select(2, back)
    return with_scale_means(BlockFit(tensors["row_scale"], tensors["column_scale"][back], sign, salient))


def build_block_fit(extra: tuple[str, ...] = ()) -> Build:
    """Compile, or take from the cache; see `compile_library`."""
    return compile_library((*FLAGS, *extra), (SOURCE,), _declare)


@lru_cache(maxsize=1)
def _build() -> Build:
    """The process's one attempt."""
    build = attempted(build_block_fit)
    if build.library is None:
        warn(f"many weights take longer to solve than they must, their fit runs in torch: {build.reason}.")
    return build


def _declare(library: Library) -> None:
    library.sab_fit_block.argtypes = [ctypes.c_void_p]
