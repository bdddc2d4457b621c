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
    before = packed.tensors["weight"][0, :, start // 32 - 1] if start else None
    return columns_of(whole, local, start, stop, before)


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
        columns = cut(packed, part * each, (part + 1) * each)
        found = columns.layers
        assert (columns.front, columns.back) == (0, 0)
        for piece in found:
            piece.validate()
        assert torch.equal(torch.cat([piece.dequantize() for piece in found], 1), dense[:, part * each :][:, :each])
        assert pieces is None or len(found) == pieces[part]
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for p in found for tensor in p.tensors.values())


@pytest.mark.parametrize("kind", ["one", "two", "no residual"])
@pytest.mark.parametrize(
    ("block", "width", "parts", "around"),
    [
        (128, 512, 2, [(0, 0), (128, 0)]),  # at blocks' bounds: the block before, for its last word
        (128, 384, 2, [(0, 64), (64, 0)]),  # in the middle of a block
        (256, 192, 3, [(0, 128), (64, 64), (128, 0)]),  # all within one
        (128, 480, 3, [(0, 96), (32, 64), (64, 0)]),  # and a narrower last block
        (128, 416, 1, [(0, 0)]),
        (512, 1184, 37, None),
    ],
)
def test_a_share_of_coded_columns_holds_what_they_depend_on(kind, block, width, parts, around):
    settings = {
        "one": {"code": "trellis16"},
        "two": {"code": "trellis16x2", "base_planes": 2, "salient_fraction": 0.125},
        "no residual": {"code": "trellis16", "residual_planes": 0},
    }[kind]
    packed = random_packed(OUT, width, LayerSettings(block_size=block, **settings))
    dense = packed.dequantize()
    each = width // parts
    for part in range(parts):
        columns = cut(packed, part * each, (part + 1) * each)
        [layer] = columns.layers
        layer.validate()
        assert layer.in_features == columns.front + each + columns.back
        weight = layer.dequantize()
        assert torch.equal(weight[:, columns.front : columns.front + each], dense[:, part * each :][:, :each])
        assert not weight[:, : columns.front].any() and not weight[:, columns.front + each :].any()
        assert around is None or (columns.front, columns.back) == around[part]
        assert columns.front <= block and columns.back < block


@pytest.mark.parametrize("salient", [0, 64])
def test_a_piece_without_salient_columns_or_with_nothing_else_is_a_layer_too(salient):
    settings = LayerSettings(block_size=128, salient_fraction=0.5)
    packed = random_packed(OUT, 128, settings)
    packed.tensors["residual_index"].copy_(torch.arange(64))  # all in the first half
    dense = packed.dequantize()
    start = 0 if salient else 64
    [piece] = cut(packed, start, start + 64).layers
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
