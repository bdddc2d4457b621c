"""A share of a layer's columns is layers of the format whose weights are those columns."""

import pytest
import torch

from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.format.random_weight import random_packed
from optimum_sab.format.share import COLUMN_DIMENSIONS, ROW_DIMENSIONS, columns_of

OUT = 24
SETTINGS = {
    "plain": {},
    "two bits": {"base_planes": 2, "residual_planes": 1, "salient_fraction": 0.125},
    "no residual": {"base_planes": 2, "residual_planes": 0},
    "fp16": {"row_scale": "fp16"},
    "mostly salient": {"salient_fraction": 0.9},
}


def cut(packed, start, stop):
    """As the loader reads it: what is cut evenly is the share's, the rest is whole."""
    local = {"weight": packed.tensors["weight"][..., start // 32 : stop // 32]}
    local["col_scale"] = packed.tensors["col_scale"][start:stop]
    kept = {name: tensor for name, tensor in packed.tensors.items() if name not in COLUMN_DIMENSIONS}
    whole = PackedWeight({**kept, **local}, packed.out_features, packed.in_features, packed.settings)
    return columns_of(whole, local, start, stop)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize(
    ("block", "width", "parts", "pieces"),
    [
        (64, 256, 2, [1, 1]),  # at blocks' bounds
        (64, 192, 2, [2, 2]),  # in the middle of a block
        (512, 384, 3, [1, 1, 1]),  # all within one
        (96, 480, 3, [2, 3, 2]),  # of the middle share both ends
        (64, 288, 3, [2, 2, 1]),  # a narrower last block
        (64, 352, 1, [1]),
        (512, 1184, 37, None),
    ],
)
def test_shares_of_columns_are_the_columns(kind, block, width, parts, pieces):
    packed = random_packed(OUT, width, LayerSettings(block_size=block, **SETTINGS[kind]))
    dense = packed.dequantize()
    each = width // parts
    for part in range(parts):
        found = cut(packed, part * each, (part + 1) * each)
        for piece in found:
            piece.validate()
        assert torch.equal(torch.cat([piece.dequantize() for piece in found], 1), dense[:, part * each :][:, :each])
        assert pieces is None or len(found) == pieces[part]
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for p in found for tensor in p.tensors.values())


@pytest.mark.parametrize("salient", [0, 64])
def test_a_piece_without_salient_columns_or_with_nothing_else_is_a_layer_too(salient):
    settings = LayerSettings(block_size=128, salient_fraction=0.5)
    packed = random_packed(OUT, 128, settings)
    packed.tensors["residual_index"].copy_(torch.arange(64))  # all in the first half
    dense = packed.dequantize()
    start = 0 if salient else 64
    [piece] = cut(packed, start, start + 64)
    piece.validate()
    assert piece.settings.residual_planes == bool(salient)
    assert torch.equal(piece.dequantize(), dense[:, start : start + 64])


@pytest.mark.parametrize("kind", SETTINGS)
def test_rows_cut_along_their_dimensions_are_the_rows(kind):
    settings = LayerSettings(block_size=64, **SETTINGS[kind])
    packed = random_packed(OUT, 160, settings)
    half = {
        name: tensor.chunk(2, ROW_DIMENSIONS[name])[1] if name in ROW_DIMENSIONS else tensor
        for name, tensor in packed.tensors.items()
    }
    share = PackedWeight(half, OUT // 2, 160, settings)
    share.validate()
    assert torch.equal(share.dequantize(), packed.dequantize()[OUT // 2 :])
