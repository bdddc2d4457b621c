"""Names, shapes and dtypes of a packed layer's tensors: the one place that decides the format.

Every tensor is an integer tensor. Scales are stored as the bit patterns of their float type, because loaders cast
floating tensors to the model's dtype (Transformers 4.57 does, and so does ``model.half()``), which would change
the weights silently.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from optimum_sab.core.code import NO_CODE
from optimum_sab.core.planes import block_bounds
from optimum_sab.core.settings import LayerSettings

FORMAT_VERSIONS = (1, 2)  # that are read; 2 is 1 with coded planes, and written where there are any
STORED_SETTINGS = ("block_size", "base_planes", "residual_planes", "salient_fraction", "row_scale", "code")
"""What a reader has to know of a layer: shapes follow from the first five, and what its bits mean from the last."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def format_version(codes: Iterable[object]) -> int:
    """The version in which layers with these codes are stored."""
    return 1 if all(code == NO_CODE for code in codes) else 2


def salient_per_block(in_features: int, settings: LayerSettings) -> list[int]:
    """Number of salient columns of every block."""
    return [settings.salient_columns(e - s) for s, e in block_bounds(in_features, settings.block_size)]


def tensor_specs(out_features: int, in_features: int, settings: LayerSettings) -> dict[str, TensorSpec]:
    """The stored tensors of a layer, bias aside.

    - ``weight`` int32 [base_planes, out, ⌈in/32⌉]: base signs, bit i of word w is column ``32 w + i``, 1 is +1.
      With a code, the first plane holds the bits that planes are derived of (core/code.py).
      It keeps this name, and a rank that no dense weight has, so that a reader without the plugin stops with a
      size mismatch.
    - ``residual_sign`` uint8 [residual_planes, out, ⌈salient/8⌉]: signs of the salient columns, ascending.
    - ``residual_index`` uint8 (int16 where a block is wider than 256) [salient]: the salient columns, counted from
      their block's first column.
    - ``row_scale`` uint8 (bits of float8_e4m3fn) or int16 (bits of float16) [planes, blocks, out].
    - ``row_exponent`` int8 [out]: fp8 row scales are to be multiplied by 2 to this power.
    - ``col_scale`` int16 (bits of float16) [in].
    """
    blocks = len(block_bounds(in_features, settings.block_size))
    salient = sum(salient_per_block(in_features, settings))
    specs = {"weight": TensorSpec((settings.base_planes, out_features, -(-in_features // 32)), torch.int32)}
    if settings.residual_planes:
        specs["residual_sign"] = TensorSpec((settings.residual_planes, out_features, -(-salient // 8)), torch.uint8)
        index = torch.uint8 if settings.block_size <= 256 else torch.int16
        specs["residual_index"] = TensorSpec((salient,), index)
    scale = torch.uint8 if settings.row_scale == "fp8" else torch.int16
    specs["row_scale"] = TensorSpec((settings.planes, blocks, out_features), scale)
    if settings.row_scale == "fp8":
        specs["row_exponent"] = TensorSpec((out_features,), torch.int8)
    specs["col_scale"] = TensorSpec((in_features,), torch.int16)
    return specs


def stored_bits_per_weight(out_features: int, in_features: int, settings: LayerSettings) -> float:
    """Bits per weight of a layer of this shape, from the bytes of its specs (bias aside)."""
    total = 0
    for spec in tensor_specs(out_features, in_features, settings).values():
        count = 1
        for size in spec.shape:
            count *= size
        total += count * spec.dtype.itemsize
    return 8.0 * total / (out_features * in_features)
