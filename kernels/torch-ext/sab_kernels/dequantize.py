"""Packed signs to a dense weight: what many tokens do once before an ordinary matrix product."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Extent, PackedRows, layer_kind
from .coded import derived_word, place_before, word_before_is_there
from .device import computing_dtype, device_traits, on_device
from .geometry import TILE_COLUMNS, TILE_ROWS, Geometry, ceil_div
from .operand import RowScales, float_operand, load_tile_scale, operand_column, operand_row, scale_exponent_offset
from .scaled import load_half

WARPS = 4  # and row tiles of a program


@triton.jit
def _load_words(ptr, row_stride, tiles, TILES: tl.constexpr):
    """Words of one tile in TILES row tiles, int32 [TILES, g, q, r]; 0 in row tiles that are not there."""
    flat = tl.arange(0, TILES * 128)
    words = tl.load(ptr + flat // 128 * row_stride + flat % 128, mask=flat // 128 < tiles, other=0)
    return words.reshape(TILES, 8, 4, 4)


@triton.jit
def _load_words_before(ptr, row_stride, tile, tiles, TILES: tl.constexpr, KIND: tl.constexpr):
    """The words before them in their rows; 0 where a row starts."""
    flat = tl.arange(0, TILES * 128)
    there = (flat // 128 < tiles) & word_before_is_there(flat % 128, tile, 1)
    words = tl.load(ptr + flat // 128 * row_stride + place_before(flat % 128, KIND, 1), mask=there, other=0)
    return words.reshape(TILES, 8, 4, 4)


@triton.jit
def _base_values(words, scale, part, TILES: tl.constexpr, ORDER: tl.constexpr):
    """±scale of a plane's signs in half of a tile, fp32 [32 · TILES, 64]: rows as in small_batch.py, columns (s, h,
    i // 2, q, i % 2), which is how lanes hold the accumulator of a matrix instruction.

    Args:
        words: int32 [TILES, g, q, r].
        scale: fp32 [TILES, g, q, r, s].
        part: 0 or 1; of a coded layer, columns 16 part + 8 s + 4 h + i of every lane's 32.
        ORDER: which bit is which column: "plain"; of a coded layer, "natural" or "unshuffled".
    """
    s = tl.arange(0, 2)[None, None, None, None, :, None, None]
    h = tl.arange(0, 2)[None, None, None, None, None, :, None]
    i = tl.arange(0, 4)[None, None, None, None, None, None, :]
    if ORDER == "plain":
        bit = 16 * h + 4 * i + (part * 2 + s)
    elif ORDER == "natural":
        bit = 16 * part + 8 * s + 4 * h + i
    else:
        bit = i % 2 * 16 + 8 * part + 4 * s + 2 * h + i // 2
    # the sign bit is the inverted bit of the word
    flipped = (~words)[:, :, :, :, None, None, None] << (31 - bit)
    bits = scale[:, :, :, :, :, None, None].to(tl.int32, bitcast=True) ^ (flipped & -2147483648)
    values = bits.to(tl.float32, bitcast=True).reshape(TILES, 8, 4, 2, 2, 2, 2, 2, 2)  # t g q m z s h i//2 i%2
    return values.permute(3, 0, 4, 1, 5, 6, 7, 2, 8).reshape(TILES * 32, 64)


@triton.jit
def _slot_operand(words, scale, step, TILES: tl.constexpr, WIDE_LANES: tl.constexpr):
    """±scale of two slots, fp16 [32 · TILES, 32], in the order of `operand.load_float_operands`.

    Args:
        words: int32 [TILES, g, q, r] of a tile of slots.
        scale: fp32 [TILES, g, q, r, h].
        step: which two slots of the tile.
    """
    h = tl.arange(0, 2)[None, None, None, None, :, None]
    i = tl.arange(0, 4)[None, None, None, None, None, :]
    bit = (words[:, :, :, :, None, None] >> (16 * h + 4 * i + step)) & 1
    values = tl.where(bit != 0, scale[:, :, :, :, :, None], -scale[:, :, :, :, :, None]).to(tl.float16)
    return float_operand(values, TILES, WIDE_LANES)


@triton.jit
def dequantize_kernel(
    layer,  # PackedRows
    place_ptr,  # int32 [column tiles · 128]: place of a column among the slots, or −1
    column_scale_ptr,  # int16 [column tiles · 128]
    out_ptr,  # float [rows, columns], of the rows from the first row tile on
    first_tile,
    rows,  # up to which one is written
    row_tiles,
    columns,
    extent,  # Extent
    KIND: tl.constexpr,
    TILES: tl.constexpr,
    WIDE_LANES: tl.constexpr,
):
    """TILES row tiles by half a column tile, which is two steps.

    Salient columns get their residual through the matrix unit: signs times row scales of the slots, times a matrix of
    zeros and ones that sends every place to its column. All of it is exact in fp16 times 1 added in fp32.
    """
    BASE: tl.constexpr = KIND.base_planes
    RESIDUAL: tl.constexpr = KIND.residual_planes
    SLOTS_PER_BLOCK: tl.constexpr = KIND.slots_per_block
    first = first_tile + tl.program_id(0) * TILES
    half_tile = tl.program_id(1)
    tile = half_tile // 2
    part = half_tile % 2
    CODED: tl.constexpr = len(KIND.code) > 0
    # columns of the program lie within left and right
    if CODED:
        left = tile * 128
        right = left + 127
    else:
        left = half_tile * 64
        right = left + 63
    tiles = row_tiles - first
    weight_stride = extent.column_tiles * (BASE * 128)
    weight_ptr = layer.weight + (first.to(tl.int64) * weight_stride + tile * (BASE * 128))
    scale_stride = extent.blocks * ((BASE + RESIDUAL) * 32)
    row_scale_ptr = layer.row_scale + first.to(tl.int64) * scale_stride
    n = tl.arange(0, 64)  # column of the accumulator: s, h, i // 2, q, i % 2
    if CODED:
        column = left + n // 2 % 4 * 32 + part * 16 + n // 8 * 2 + n % 2
    else:
        column = left + n // 32 * 32 + n // 16 % 2 * 16 + n // 2 % 4 * 4 + n // 8 % 2 * 2 + n % 2
    for plane in tl.static_range(BASE):
        words = _load_words(weight_ptr + plane * 128, weight_stride, tiles, TILES)
        scales = RowScales(row_scale_ptr + plane * 32, scale_stride, extent.blocks)
        scale = load_tile_scale(scales, tiles, left // KIND.block_size, (left + 32) // KIND.block_size, TILES, KIND)
        if plane > 0:
            value += _base_values(words, scale, part, TILES, "unshuffled" if CODED else "plain")
        elif CODED:
            before = _load_words_before(weight_ptr, weight_stride, tile, tiles, TILES, KIND)
            value = _base_values(derived_word(words, before, KIND.code[0]), scale, part, TILES, "natural")
            value += _base_values(derived_word(words, before, KIND.code[1]), scale * 0.5, part, TILES, "natural")
        else:
            value = _base_values(words, scale, part, TILES, "plain")
    if RESIDUAL > 0 and SLOTS_PER_BLOCK > 0:
        residual_stride = extent.slot_tiles * (RESIDUAL * 128)
        residual_ptr = layer.residual_sign + first.to(tl.int64) * residual_stride
        place = tl.load(place_ptr + column)
        kappa = tl.arange(0, 32)
        source = operand_column(kappa, WIDE_LANES)
        start = left // KIND.block_size * SLOTS_PER_BLOCK
        stop = (tl.minimum(right, columns - 1) // KIND.block_size + 1) * SLOTS_PER_BLOCK
        for entry in range(start // 2, (stop + 1) // 2):
            sends = (place[None, :] == (entry * 32 + source)[:, None]).to(tl.float16)
            for plane in tl.static_range(RESIDUAL):
                at = residual_ptr + (entry // 4 * RESIDUAL + plane) * 128
                slot_words = _load_words(at, residual_stride, tiles, TILES)
                scales = RowScales(row_scale_ptr + (BASE + plane) * 32, scale_stride, extent.blocks)
                block, next_block = entry * 2 // SLOTS_PER_BLOCK, (entry * 2 + 1) // SLOTS_PER_BLOCK
                slot_scale = load_tile_scale(scales, tiles, block, next_block, TILES, KIND)
                value = tl.dot(_slot_operand(slot_words, slot_scale, entry % 4, TILES, WIDE_LANES), sends, value)
    row = operand_row(first * 32, TILES)
    if KIND.fp8:
        exponent = tl.load(layer.row_exponent + row, mask=row < rows, other=0).to(tl.int32)
        power = (exponent + (127 + scale_exponent_offset(KIND))) << 23
        value *= power.to(tl.float32, bitcast=True)[:, None]
    value *= load_half(column_scale_ptr + column, column >= 0)[None, :]
    # to the order of memory: columns (s, h, q, i // 2, i % 2), or (q, s, h, i)
    value = value.to(out_ptr.dtype.element_ty)
    if CODED:
        value = value.reshape(TILES * 32, 8, 4, 2).permute(0, 2, 1, 3).reshape(TILES * 32, 64)
        out_column = left + n // 16 * 32 + part * 16 + n % 16
    else:
        value = value.reshape(TILES * 32, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(TILES * 32, 64)
        out_column = left + n
    out_row = (row - first_tile * 32).to(tl.int64)
    inside = (row < rows)[:, None] & (out_column < columns)[None, :]
    tl.store(out_ptr + out_row[:, None] * columns + out_column[None, :], value, mask=inside)


def dequantize(
    tensors: dict[str, Tensor], geometry: Geometry, dtype: torch.dtype = torch.float32, rows: slice | None = None
) -> Tensor:
    """The dense weight [rows, columns], or a run of its rows that starts at a multiple of 32.

    Raises:
        ValueError: ``rows`` does not start at a multiple of 32.
    """
    start, stop, _ = (rows or slice(None)).indices(geometry.rows)
    if start % TILE_ROWS:
        raise ValueError(f"rows start at {start}; dequantization starts at a multiple of {TILE_ROWS}.")
    device = tensors["weight"].device
    out = torch.empty(max(0, stop - start), geometry.columns, dtype=computing_dtype(dtype, device), device=device)
    if out.numel():
        with on_device(device):
            dequantize_into(out, tensors, geometry, start)
    return out.to(dtype)


def dequantize_into(out: Tensor, tensors: dict[str, Tensor], geometry: Geometry, start: int) -> None:
    """Fill ``out`` [some rows, columns], contiguous, with the dense rows from ``start``, a multiple of 32, on."""
    device = device_traits(out.device)
    places = tensors["weight"]  # not read without residual planes
    if geometry.residual_planes:
        places = tensors["residual_index"][geometry.slot_tiles * TILE_COLUMNS :]
    stop = start + out.shape[0]
    first, row_tiles = start // TILE_ROWS, ceil_div(stop, TILE_ROWS)
    dequantize_kernel[(ceil_div(row_tiles - first, WARPS), 2 * geometry.column_tiles)](
        PackedRows.of(tensors),
        places,
        tensors["col_scale"],
        out,
        first,
        stop,
        row_tiles,
        geometry.columns,
        Extent(geometry.column_tiles, geometry.slot_tiles, geometry.blocks),
        KIND=layer_kind(geometry, device),
        TILES=WARPS,
        WIDE_LANES=not device.warpgroup,
        num_warps=WARPS,
        num_stages=1,  # nothing to load ahead of, and no registers left for it
    )
