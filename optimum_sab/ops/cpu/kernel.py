"""Linears and dense weights on the CPU, from a layer's stored tensors as they are."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_sab.errors import ConfigError
from optimum_sab.ops.cpu.compiler import Library, load_library
from optimum_sab.ops.cpu.layer import Layer, describe, known_layer
from optimum_sab.ops.shape import LayerShape

if TYPE_CHECKING:
    from optimum_sab.format.packed_weight import PackedWeight

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_MEMBERS = 4  # MEMBERS of binary_linear.c

# Tokens from which the weight is made dense, a chunk of rows at a time, and multiplied by torch; fewer go through the
# packed kernel. By (path, matrix unit), as the library tells them. Measured at 4096 × 4096 on two Zen 4 cores, packed
# against dense chunks: AVX-512, fp32 20.5 and 49.7 ms at 256 tokens; bf16, in integers, half of the time of a dense
# product, which has no chunks to make (4096 × 14336, 64 and 512 tokens): never. AVX2 with torch held to AVX2 as well,
# one core, bf16 49 and 184 ms at 128 tokens, fp32 48 and 52: never. The portable path, one core, fp32 10.7 and 23 ms
# at 16 tokens, 42 and 39 at 64; 32 leaves room for processors (Arm) whose dense products are better. A bf16 matrix
# unit (AMX) is not measured; 32 follows from its rate.
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


def linear(inputs: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`linear_of` the tensors of a `PackedWeight`, all of which are checked."""
    shape = _shape(packed)
    if any(name not in packed.tensors for name in shape.names):
        describe([packed.tensors.get(name) for name in shape.names], shape)  # which names it
    return linear_of(inputs, [packed.tensors[name] for name in shape.names], shape, bias)


def linear_of(inputs: Tensor, tensors: Sequence[Tensor], shape: LayerShape, bias: Tensor | None = None) -> Tensor:
    """``y = x Ŵᵀ + b``, without gradients.

    Computed in fp32 from the signs (coded planes with AVX2 in integers of more bits; bf16 inputs with AVX-512 in
    integers of 16 bits, integers.h) and rounded once, and once more where a bias is added. Where dense products are
    faster (`_DENSE_FROM`) many tokens are multiplied with dense chunks of the weight, in bf16 for bf16 inputs (as
    accurate as a dense layer), else in fp32.

    Args:
        inputs: x [tokens, in], float32, bfloat16 or float16 in CPU memory, contiguous or not.
        tensors: Ŵ as stored, in the order of ``shape.names``, contiguous in CPU memory.
        shape: of the layer.
        bias: b [out] of any floating dtype, or None.

    Returns:
        y [tokens, out] in x's dtype.

    Raises:
        ConfigError: x is not such a tensor, or the bias is on another device.
        FormatError: a stored tensor is not as `tensor_specs` says, or not contiguous in CPU memory.
        MissingDependencyError: the kernel cannot be compiled here (compiler.py).
        MemoryError: no room for the scratch memory.
    """
    dtype, (rows, columns, *_) = inputs.dtype, shape
    if dtype not in DTYPES or not inputs.is_cpu:
        raise ConfigError(
            f"the input is {dtype} on {inputs.device}; the CPU kernel takes float32, bfloat16 or float16 on the CPU."
        )
    if inputs.dim() != 2 or inputs.shape[1] != columns:
        raise ConfigError(f"the input is {tuple(inputs.shape)}, the CPU kernel takes [tokens, {columns}].")
    if bias is not None and not bias.is_cpu:
        raise ConfigError(f"the bias is on {bias.device}, the layer on the CPU; move one of them.")
    library = load_library()
    layer = known_layer(tensors, shape)
    x = inputs.contiguous()
    tokens = x.shape[0]
    added = bias
    if added is not None and not (added.dtype is dtype and added.shape == (rows,) and added.is_contiguous()):
        added = added.detach().to(dtype).expand(rows).contiguous()
    if tokens >= dense_from(library, dtype):
        y = multiply_dense(library, layer, x)
        return y if added is None else y.add_(added.detach())
    y = torch.empty((tokens, rows), dtype=dtype)
    status = library.sab_linear(
        ctypes.addressof(layer),
        y.data_ptr(),
        None if added is None else added.data_ptr(),
        x.data_ptr(),
        tokens,
        DTYPES[dtype],
        torch.get_num_threads(),
    )
    check_status(status, rows, columns)
    return y


def dense_from(library: Library, dtype: torch.dtype) -> int:
    """Tokens from which `linear` goes through the dense weight."""
    return _DENSE_FROM[library.kind][dtype]


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
    library, shape = load_library(), _shape(packed)
    layer = describe([packed.tensors.get(name) for name in shape.names], shape)
    dense = torch.empty((packed.out_features, packed.in_features), dtype=dtype)
    _dequantize_rows(library, layer, 0, dense)
    return dense


def check_status(status: int, out_features: int, in_features: int) -> None:
    """Of a function of the library.

    Raises:
        MemoryError: there was no room for the scratch memory.
    """
    if status:
        raise MemoryError(f"no memory for the scratch of a packed linear of {out_features} × {in_features}; free some.")


def multiply_dense(library: Library, layer: Layer, x: Tensor) -> Tensor:
    """`linear` through dense chunks of rows that stay in the cache between being written and being multiplied."""
    # A matmul in fp16 took three times as long as one in fp32 here (no fp16 arithmetic).
    dtype = torch.bfloat16 if x.dtype is torch.bfloat16 else torch.float32
    factor = x.to(dtype)
    rows = max(1, min(layer.rows, _CHUNK_BYTES // (layer.columns * dtype.itemsize)))
    scratch = torch.empty((rows, layer.columns), dtype=dtype)
    y = torch.empty((x.shape[0], layer.rows), dtype=dtype)
    with torch.no_grad():
        for row in range(0, layer.rows, rows):
            dense = scratch[: layer.rows - row]
            _dequantize_rows(library, layer, row, dense)
            torch.mm(factor, dense.T, out=y[:, row : row + dense.shape[0]])
    return y.to(x.dtype)


def _dequantize_rows(library: Library, layer: Layer, row: int, out: Tensor) -> None:
    """Fill `out` [rows, in], contiguous, with the dense rows from `row` on."""
    status = library.sab_dequantize(
        ctypes.addressof(layer), row, row + out.shape[0], out.data_ptr(), DTYPES[out.dtype], torch.get_num_threads()
    )
    check_status(status, layer.rows, layer.columns)


def _shape(packed: PackedWeight) -> LayerShape:
    return LayerShape.of(packed.out_features, packed.in_features, packed.settings)
