"""Packed signs to a dense weight: what many tokens do once before an ordinary matrix product."""

import triton
import triton.language as tl

from .operand import scale_of_bits
from .prepare import load_half


@triton.jit
def _signed(ptr, place, bit, there, scale):
    word = tl.load(ptr + place, mask=there, other=0)
    return tl.where(((word >> bit) & 1) != 0, scale, -scale)


@triton.jit
def dequantize_kernel(
    weight_ptr,  # int32 [row tiles, column tiles, BASE, 128]
    residual_ptr,  # int32 [row tiles, slot tiles, RESIDUAL, 128]
    place_ptr,  # int32 [column tiles · 128]: place of a column among the slots, or −1
    row_scale_ptr,  # uint8 or int16 [row tiles, blocks, planes, 32]
    row_exponent_ptr,  # int8 [row tiles · 32]
    column_scale_ptr,  # int16 [column tiles · 128]
    out_ptr,  # float [rows, columns], of the rows from the first row tile on
    first_tile,
    rows,
    columns,
    column_tiles,
    slot_tiles,
    blocks,
    BASE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    FP8: tl.constexpr,
):
    """One tile of 32 rows by 128 columns, in the order of operations of the reference: equal to it bit by bit."""
    PLANES: tl.constexpr = BASE + RESIDUAL
    row_tile = (first_tile + tl.program_id(0)).to(tl.int64)
    tile = tl.program_id(1)
    row = tl.arange(0, 32)
    column = tl.arange(0, 128)
    scale_ptr = row_scale_ptr + row_tile * (blocks * (PLANES * 32)) + (row % 8 * 4 + row // 8)[:, None]
    exponent = tl.zeros((32,), tl.int32)
    if FP8:
        exponent = tl.load(row_exponent_ptr + row_tile * 32 + row).to(tl.int32)
    power = ((exponent + 127) << 23).to(tl.float32, bitcast=True)[:, None]
    block = (tile * 128 + column) // BLOCK_SIZE
    known = (row >= 0)[:, None] & (block < blocks)[None, :]
    lane = (row % 8)[:, None] * 16 + (column // 4 % 4)[None, :] * 4 + (row // 8)[:, None]
    bit = (column // 16 % 2 * 16 + column % 4 * 4 + column // 32)[None, :]
    tile_ptr = weight_ptr + (row_tile * column_tiles + tile) * (BASE * 128)
    value = tl.zeros((32, 128), tl.float32)
    for plane in tl.static_range(BASE):
        bits = tl.load(scale_ptr + (block * PLANES + plane)[None, :] * 32, mask=known, other=0)
        scale = scale_of_bits(bits, FP8, False, False)
        scale *= power * (256.0 if FP8 else 1.0)
        value += _signed(tile_ptr, lane + plane * 128, bit, known, scale)
    if RESIDUAL > 0:
        place = tl.load(place_ptr + tile * 128 + column)
        salient = known & (place >= 0)[None, :]
        slot = place // 16
        lane = (row % 8)[:, None] * 16 + (place // 4 % 4)[None, :] * 4 + (row // 8)[:, None]
        bit = (place // 16 % 2 * 16 + place % 4 * 4 + place // 32 % 4)[None, :]
        rest_ptr = residual_ptr + row_tile * slot_tiles * (RESIDUAL * 128)
        for plane in tl.static_range(RESIDUAL):
            entry = (slot // SLOTS_PER_BLOCK * PLANES + BASE + plane)[None, :] * 32
            bits = tl.load(scale_ptr + entry, mask=salient, other=0)
            scale = scale_of_bits(bits, FP8, False, False)
            scale *= power * (256.0 if FP8 else 1.0)
            at = (place // 128 * RESIDUAL + plane)[None, :] * 128 + lane
            value += _signed(rest_ptr, at, bit, salient, scale)
    value *= load_half(column_scale_ptr + tile * 128 + column, column >= 0)[None, :]
    out_row = tl.program_id(0).to(tl.int64) * 32 + row
    out_column = tile * 128 + column
    inside = (row_tile * 32 + row < rows)[:, None] & (out_column < columns)[None, :]
    tl.store(
        out_ptr + out_row[:, None] * columns + out_column[None, :], value.to(out_ptr.dtype.element_ty), mask=inside
    )
