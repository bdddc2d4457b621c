"""What kernels are given, in groups that a launcher fills and a kernel reads by name.

Tensors and sizes are `NamedTuple`s, which Triton passes to a kernel, and from function to function in it, member by
member. What a kernel is compiled for is one frozen dataclass, a constant. (A member must not be called ``values`` or
``type``: Triton's own tuples have those.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from .code_words import pair_words
from .device import DeviceTraits
from .geometry import Geometry

MAX_STACK = 4  # layers whose outputs one launch writes


@dataclass(frozen=True)
class LayerKind:
    """What kernels are compiled for, of a layer and of a device.

    Attributes:
        base_planes, residual_planes, block_size, slots_per_block, fp8: as in `Geometry`.
        native_fp8, asm: as in `DeviceTraits`.
        code: as in `Geometry`.
    """

    base_planes: int
    residual_planes: int
    block_size: int
    slots_per_block: int
    fp8: bool
    native_fp8: bool
    asm: bool
    code: tuple[int, ...] = ()

    @property
    def pair_words(self) -> str:
        """PTX of the words of pairs (coded.py)."""
        return pair_words(self.code, "$8", "$9")

    @property
    def pair_words_of_halves(self) -> str:
        """The same where there are two results."""
        return pair_words(self.code, "$2", "$3")


@cache
def layer_kind(geometry: Geometry, device: DeviceTraits) -> LayerKind:
    """The kind of a layer on a device."""
    return LayerKind(
        geometry.base_planes,
        geometry.residual_planes,
        geometry.block_size,
        geometry.slots_per_block,
        geometry.fp8,
        device.native_fp8,
        device.asm,
        geometry.code,
    )


class PackedRows(NamedTuple):
    """The tensors of a layer that have rows, in the kernel layout (layout.py).

    In the place of one that the layer does not have stands any other, which is not read.
    """

    weight: Any  # int32 [row tiles, column tiles, base planes, 128]
    residual_sign: Any  # int32 [row tiles, slot tiles, residual planes, 128]
    row_scale: Any  # uint8 or int16 [row tiles, blocks, planes, 32]
    row_exponent: Any  # int8 [row tiles · 32]

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> PackedRows:
        weight = tensors["weight"]
        residual_sign, exponent = tensors.get("residual_sign", weight), tensors.get("row_exponent", weight)
        return cls(weight, residual_sign, tensors["row_scale"], exponent)


class Extent(NamedTuple):
    """How far a layer goes, in what a kernel counts."""

    column_tiles: Any
    slot_tiles: Any
    blocks: Any


class Activations(NamedTuple):
    """What is multiplied, and how it is prepared."""

    x: Any  # float [tokens, columns]
    col_scale: Any  # int16 [column tiles · 128]: fp16 bits
    residual_index: Any  # int32 [slot tiles · 128]: columns in the slots
    tokens: Any
    columns: Any
    stride: Any  # of x between tokens


class LimbOperand(NamedTuple):
    """Activations as 8-bit integers (prepare.py): of the columns, or of the slots. Tokens are padded."""

    limb: Any  # int8 [tiles, 4 steps, 64 · tokens; of slots 128 · tokens]: matrix operands in lane order
    start: Any  # int32 [tiles, groups, tokens; of slots tiles, 4 steps, 2 slots, tokens]: what is added to a sum
    unit: Any  # fp32 [tiles, tokens; of slots tiles, 4 steps, 2 slots, tokens]: −2 · unit
    # with a code, start and unit of the columns are [tiles, 2, tokens]: for the coded plane, and for those that are not


class ByteTables(NamedTuple):
    """Tables of the byte permutation (operand.py)."""

    even: Any
    pair: Any
    ones: Any


class Parts(NamedTuple):
    """Where programs that share an output leave their sums over some of the columns (finish.py)."""

    total: Any  # fp32 [programs but for those that share, SPLIT, TOKENS, ROWS]
    counter: Any  # int32 [programs but for those that share], zero


class Stack(NamedTuple):
    """The layers that lie below each other in the rows, always `MAX_STACK` of them: those past their number, and biases
    where there are none, are not touched."""

    biases: Any  # of float [rows of the layer]
    outputs: Any  # of float [tokens, rows of the layer]
    bounds: Any  # first rows of the second to the fourth layer; of one that is not there, the number of rows
    rows: Any
