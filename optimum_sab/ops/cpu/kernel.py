"""Linears and dense weights of a `PackedWeight` on the CPU, from its stored tensors as they are."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from optimum_sab.errors import ConfigError, FormatError
from optimum_sab.format.layout import TensorSpec, salient_per_block, tensor_specs
from optimum_sab.ops.cpu.compiler import load_library

if TYPE_CHECKING:
    from torch import Tensor

    from optimum_sab.core.settings import LayerSettings
    from optimum_sab.format.packed_weight import PackedWeight

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Layer(ctypes.Structure):
    """`layer_t` of binary_linear.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "residual_sign", "residual_index")),
        *((name, ctypes.c_void_p) for name in ("row_scale", "row_exponent", "col_scale")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "block_size", "base_planes", "residual_planes")),
        *((name, ctypes.c_int64) for name in ("salient", "salient_last", "wide_index")),
    ]


@dataclass(frozen=True)
class _Layout:
    """What follows from a layer's shape and settings, computed once per kind of layer.

    Attributes:
        specs: of the stored tensors.
        layer: bytes of a `_Layer` without pointers.
    """

    specs: tuple[tuple[str, TensorSpec], ...]
    layer: bytes


@lru_cache(maxsize=1024)
def _layout(rows: int, columns: int, settings: LayerSettings) -> _Layout:
    salient = salient_per_block(columns, settings)
    layer = _Layer(
        rows=rows,
        columns=columns,
        block_size=settings.block_size,
        base_planes=settings.base_planes,
        residual_planes=settings.residual_planes,
        salient=salient[0],
        salient_last=salient[-1],
        wide_index=settings.block_size > 256,
    )
    return _Layout(tuple(tensor_specs(rows, columns, settings).items()), bytes(layer))


# Tokens from which the weight is made dense, a chunk of rows at a time, and multiplied by torch; fewer go through the
# packed kernel. By (path, matrix unit), as the library tells them. Measured at 4096 × 4096 on two Zen 4 cores, packed
# against dense chunks: AVX-512, bf16 5.2 and 7.6 ms at 64 tokens, 20.5 and 22.1 at 256, 81 and 82 at 1024, fp32 20.5
# and 49.7 at 256: never. AVX2 with torch held to AVX2 as well, one core, bf16 49 and 184 ms at 128 tokens, fp32 48
# and 52: never. The portable path, one core, fp32 10.7 and 23 ms at 16 tokens, 42 and 39 at 64; 32 leaves room for
# processors (Arm) whose dense products are better. A bf16 matrix unit (AMX) is not measured; 32 follows from its rate.
_NEVER = 2**62
_DENSE_FROM = {
    (2, 1): {torch.float32: _NEVER, torch.bfloat16: 32, torch.float16: _NEVER},
    (2, 0): {torch.float32: _NEVER, torch.bfloat16: _NEVER, torch.float16: _NEVER},
    (1, 1): {torch.float32: _NEVER, torch.bfloat16: 32, torch.float16: _NEVER},
    (1, 0): {torch.float32: _NEVER, torch.bfloat16: _NEVER, torch.float16: _NEVER},
    (0, 1): {torch.float32: 32, torch.bfloat16: 32, torch.float16: 32},
    (0, 0): {torch.float32: 32, torch.bfloat16: 32, torch.float16: 32},
}
# Dense rows at a time: 2 and 8 MiB measure the same, 32 MiB (more than the cache) takes 10 ms longer per 4096 × 4096.
_CHUNK_BYTES = 8 << 20


def linear(inputs: Tensor, packed: PackedWeight) -> Tensor:
    """``y = x Ŵᵀ``, without bias and without gradients.

    Computed in fp32 from the signs and rounded once. Where dense products are faster (`_DENSE_FROM`) many tokens are
    multiplied with dense chunks of the weight, in bf16 for bf16 inputs (as accurate as a dense layer), else in fp32.

    Args:
        inputs: x [tokens, in], float32, bfloat16 or float16 in CPU memory, contiguous or not.
        packed: Ŵ, its tensors contiguous in CPU memory.

    Returns:
        y [tokens, out] in x's dtype.

    Raises:
        ConfigError: x is not such a tensor.
        FormatError: a stored tensor is missing or not as `tensor_specs` says, or not contiguous in CPU memory.
        MissingDependencyError: the kernel cannot be compiled here (compiler.py).
        MemoryError: no room for the scratch memory.
    """
    dtype = inputs.dtype
    if dtype not in DTYPES or not inputs.is_cpu:
        raise ConfigError(
            f"the input is {dtype} on {inputs.device}; the CPU kernel takes float32, bfloat16 or float16 on the CPU."
        )
    if inputs.dim() != 2 or inputs.shape[1] != packed.in_features:
        raise ConfigError(f"the input is {tuple(inputs.shape)}, the CPU kernel takes [tokens, {packed.in_features}].")
    library = load_library()
    layer = _layer(packed)
    x = inputs.contiguous()
    tokens = x.shape[0]
    if tokens >= _DENSE_FROM[library.sab_path(), library.sab_matrix_unit()][dtype]:
        return _multiply_dense(library, layer, x, packed)
    y = torch.empty((tokens, packed.out_features), dtype=dtype)
    status = library.sab_linear(
        ctypes.byref(layer), x.data_ptr(), y.data_ptr(), tokens, DTYPES[dtype], torch.get_num_threads()
    )
    _check(status, packed)
    return y


def dequantize(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [out, in]: bit for bit `PackedWeight.dequantize`, rounded once to `dtype`.

    Raises:
        ConfigError: `dtype` is not float32, bfloat16 or float16.
        FormatError: a stored tensor is missing or not as `tensor_specs` says, or not contiguous in CPU memory.
        MissingDependencyError: the kernel cannot be compiled here (compiler.py).
        MemoryError: no room for the scratch memory.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"the dense weight can be float32, bfloat16 or float16, not {dtype}.")
    library = load_library()
    layer = _layer(packed)
    dense = torch.empty((packed.out_features, packed.in_features), dtype=dtype)
    _dequantize_rows(library, layer, packed, 0, dense)
    return dense


def _multiply_dense(library: ctypes.CDLL, layer: _Layer, x: Tensor, packed: PackedWeight) -> Tensor:
    """`linear` through dense chunks of rows that stay in the cache between being written and being multiplied."""
    # A matmul in fp16 took three times as long as one in fp32 here (no fp16 arithmetic).
    dtype = torch.bfloat16 if x.dtype is torch.bfloat16 else torch.float32
    factor = x.to(dtype)
    rows = max(1, min(packed.out_features, _CHUNK_BYTES // (packed.in_features * dtype.itemsize)))
    scratch = torch.empty((rows, packed.in_features), dtype=dtype)
    y = torch.empty((x.shape[0], packed.out_features), dtype=dtype)
    with torch.no_grad():
        for row in range(0, packed.out_features, rows):
            dense = scratch[: packed.out_features - row]
            _dequantize_rows(library, layer, packed, row, dense)
            torch.mm(factor, dense.T, out=y[:, row : row + dense.shape[0]])
    return y.to(x.dtype)


def _dequantize_rows(library: ctypes.CDLL, layer: _Layer, packed: PackedWeight, row: int, out: Tensor) -> None:
    """Fill `out` [rows, in], contiguous, with the dense rows from `row` on."""
    status = library.sab_dequantize(
        ctypes.byref(layer), row, row + out.shape[0], out.data_ptr(), DTYPES[out.dtype], torch.get_num_threads()
    )
    _check(status, packed)


def _layer(packed: PackedWeight) -> _Layer:
    """The layer as C reads it; every tensor is checked first, since C trusts their shapes."""
    layout = _layout(packed.out_features, packed.in_features, packed.settings)
    layer = _Layer.from_buffer_copy(layout.layer)
    tensors = packed.tensors
    for name, spec in layout.specs:
        tensor = tensors.get(name)
        if tensor is None:
            raise FormatError(f"tensor {name!r} is missing; the layer needs {', '.join(n for n, _ in layout.specs)}.")
        if tensor.dtype is not spec.dtype or tensor.shape != spec.shape:
            raise FormatError(
                f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected {spec.dtype} {spec.shape}."
            )
        if not tensor.is_cpu or not tensor.is_contiguous():
            raise FormatError(
                f"tensor {name!r} is on {tensor.device} with strides {tensor.stride()}; move it to the CPU and make "
                "it contiguous."
            )
        setattr(layer, name, tensor.data_ptr())
    return layer


def _check(status: int, packed: PackedWeight) -> None:
    if status:
        raise MemoryError(
            f"no memory for the scratch of a packed linear of {packed.out_features} × {packed.in_features}; free some."
        )
