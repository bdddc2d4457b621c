"""How a packed layer is shared: which tensors are cut along which dimension, and what a range of columns consists of.

Rows can be cut anywhere. Columns are cut at multiples of 32, which is a word of signs. Where that is inside of a block,
the block's columns on either side are a layer of their own: their row scales are the block's, and how many of them are
salient is what there happens to be. With a code a column's weights depend on the bits of the columns before it too, so
there a share is one layer of whole blocks, in which columns that are not its own have a scale of 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from optimum_sab.core.code import NO_CODE
from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.bits import pack_bits, unpack_bits
from optimum_sab.format.packed_weight import PackedWeight

if TYPE_CHECKING:
    from torch import Tensor

WORD = 32  # columns of a word of signs
ROW_DIMENSIONS = {"weight": 1, "residual_sign": 1, "row_scale": 2, "row_exponent": 0, "bias": 0}
"""Along which dimension a tensor is cut where a layer's rows are shared; others are whole."""
COLUMN_DIMENSIONS = {"weight": 2, "col_scale": 0}
"""Along which dimension a tensor is cut evenly where columns are shared; `columns_of` cuts the others."""


@dataclass(frozen=True)
class Columns:
    """Consecutive columns of a layer.

    Attributes:
        layers: whose products with consecutive inputs add up.
        front, back: columns of theirs before the first and behind the last that is meant: they have a scale of 0, and
            want an input, of zeros.
    """

    layers: tuple[PackedWeight, ...]
    front: int = 0
    back: int = 0


@dataclass(frozen=True)
class _Piece:
    """Consecutive columns [start, stop) that have blocks as the format knows them, or lie within one block."""

    start: int
    stop: int
    inside: bool  # of one block


def columns_of(
    whole: PackedWeight, local: Mapping[str, Tensor], start: int, stop: int, before: Tensor | None = None
) -> Columns:
    """The columns [start, stop) of a layer, as layers.

    ``Σ_layers x[a:b] Ŵ_layerᵀ = x[start:stop] Ŵ[:, start:stop]ᵀ``, and every entry of Ŵ is what it was.

    Args:
        whole: the layer; of its tensors, those that `COLUMN_DIMENSIONS` names are not looked at.
        local: those, cut to the columns: ``weight`` int32 [base_planes, out, (stop - start)/32], ``col_scale`` int16.
        start, stop: multiples of 32.
        before: int32 [out], the coded plane's word before ``start``, where the layer has a code and there is one.

    Returns:
        One to three layers, in the order of their columns; one with a code.
    """
    salient = whole.salient_columns()
    if whole.settings.code != NO_CODE:
        return _coded(whole, local, (start, stop), before, salient)
    pieces = _pieces(start, stop, whole.in_features, whole.settings)
    return Columns(tuple(_piece_of(whole, local, piece, start, salient) for piece in pieces))


def _coded(
    whole: PackedWeight, local: Mapping[str, Tensor], own: tuple[int, int], before: Tensor | None, salient: Tensor
) -> Columns:
    """The blocks that hold these columns and the word before them."""
    start, stop = own
    size = whole.settings.block_size
    first = max(0, start - WORD) // size * size
    last = min(whole.in_features, -(-stop // size) * size)
    front, back = start - first, last - stop
    weight = pad(local["weight"], (front // WORD, back // WORD))
    if front:
        assert before is not None
        weight[0, :, front // WORD - 1] = before
    filled = {"weight": weight, "col_scale": pad(local["col_scale"], (front, back))}
    piece = _Piece(first, last, False)
    return Columns((_piece_of(whole, filled, piece, first, salient),), front, back)


def _pieces(start: int, stop: int, width: int, settings: LayerSettings) -> list[_Piece]:
    """The rest of a block, whole blocks, the beginning of a block; as far as there are any."""
    size = settings.block_size
    first = min(-(-start // size) * size, stop)
    last = stop if stop == width else max(stop // size * size, first)
    found = [_Piece(start, first, True), _Piece(first, last, False), _Piece(last, stop, True)]
    return [piece for piece in found if piece.start < piece.stop]


def _piece_of(
    whole: PackedWeight, local: Mapping[str, Tensor], piece: _Piece, start: int, salient: Tensor
) -> PackedWeight:
    settings, size, width = whole.settings, whole.settings.block_size, piece.stop - piece.start
    first, last = (int(n) for n in torch.searchsorted(salient, torch.tensor([piece.start, piece.stop]).to(salient)))
    if piece.inside:
        settings = _of_one_block(settings, width, last - first)
    words = slice((piece.start - start) // WORD, -(-(piece.stop - start) // WORD))
    blocks = slice(piece.start // size, -(-piece.stop // size))
    tensors = {"weight": local["weight"][..., words]}
    if settings.residual_planes:
        signs = unpack_bits(whole.tensors["residual_sign"], salient.numel())[..., first:last]
        offsets = (salient[first:last] - piece.start) % settings.block_size
        tensors["residual_sign"] = pack_bits(signs)
        tensors["residual_index"] = offsets.to(torch.uint8 if settings.block_size <= 256 else torch.int16)
    tensors["row_scale"] = whole.tensors["row_scale"][: settings.planes, blocks]
    if "row_exponent" in whole.tensors:
        tensors["row_exponent"] = whole.tensors["row_exponent"]
    tensors["col_scale"] = local["col_scale"][piece.start - start : piece.stop - start]
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return PackedWeight(copies, whole.out_features, width, settings)


def _of_one_block(settings: LayerSettings, width: int, salient: int) -> LayerSettings:
    """Settings of a layer of one block of ``width`` columns, of which so many are salient."""
    if not settings.residual_planes or not salient:
        return replace(settings, block_size=width, residual_planes=0)
    share = min(salient, width - 0.25) / width  # all of them is no share that settings may have, and rounds the same
    return replace(settings, block_size=width, salient_fraction=share)
