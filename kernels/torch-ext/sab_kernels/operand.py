"""Packed signs to matrix operands in registers, and row scales to fp32."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def load_byte_operands(tile_ptr, row_stride, tables, TILES: tl.constexpr, KIND: tl.constexpr):
    """8-bit operands [32 · TILES rows, 32] of the four steps of a tile: −b, and 1 − b in the last step.

    A byte permutation (PTX ``prmt``) picks four bytes of a table by the nibbles of its selector. The selector is the
    packed word itself, so one instruction unpacks four weights: nibble i of a half word gives byte i. For bits 0 to 2
    of a nibble the table holds 0 and −1 and depends on no other bit. Bit 3 is the instruction's sign mode: a table of
    ones gives 1 where it is clear and 0 where it is set.

    Args:
        tile_ptr: int32, the first word of the first row tile.
        row_stride: words between row tiles.
        tables: 0xFF00FF00, 0xFFFF0000 and 0x01010101; arguments of the kernel, because the assembler would move a
            constant into a register before every single use.
        TILES: row tiles.
        KIND: its ``asm`` is False for the interpreter and for devices without PTX.

    Column 8 q + 4 h + i of step s is column 32 s + 16 h + 4 q + i of the tile: the order in which lanes hold it.
    """
    if KIND.asm:
        flat = tl.arange(0, TILES * 512)
        byte_ptr = tile_ptr.to(tl.pointer_type(tl.int8))
        words = tl.load(byte_ptr + (flat // 512) * (row_stride * 4) + flat % 512).reshape(TILES, 8, 4, 4, 4)
        b0, b1, b2, b3, b4, b5, b6, b7 = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.b32 t, $8, 16;"
            "prmt.b32 $0, $9, $9, $8; prmt.b32 $1, $9, $9, t;"
            "prmt.b32 $2, $13, $13, $8; prmt.b32 $3, $13, $13, t;"
            "prmt.b32 $4, 0, 0xFFFFFFFF, $8; prmt.b32 $5, 0, 0xFFFFFFFF, t;"
            "prmt.b32 $6, $17, $17, $8; prmt.b32 $7, $17, $17, t; }",
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [words, tables.even, tables.pair, tables.ones],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        flat = tl.arange(0, TILES * 128)
        words = tl.load(tile_ptr + (flat // 128) * row_stride + flat % 128).reshape(TILES, 8, 4, 4, 1)
        b0 = _bits(words, 0, 0)
        b1 = _bits(words, 0, 16)
        b2 = _bits(words, 1, 0)
        b3 = _bits(words, 1, 16)
        b4 = _bits(words, 2, 0)
        b5 = _bits(words, 2, 16)
        b6 = (1 + _bits(words, 3, 0)).to(tl.int8)
        b7 = (1 + _bits(words, 3, 16)).to(tl.int8)
    return _rows(b0, b1, TILES), _rows(b2, b3, TILES), _rows(b4, b5, TILES), _rows(b6, b7, TILES)


@triton.jit
def _bits(words, step: tl.constexpr, half: tl.constexpr):
    shift = (half + step + 4 * tl.arange(0, 4))[None, None, None, None, :]
    return (-((words >> shift) & 1)).to(tl.int8)


@triton.jit
def _rows(low, high, TILES: tl.constexpr):
    """Halves [TILES, g, q, r, i] joined to [32 · TILES, 32]: rows (r, g), columns (q, h, i)."""
    return tl.join(low, high).permute(0, 3, 1, 2, 5, 4).reshape(TILES * 32, 32)


@triton.jit
def load_limb_operand(ptr, COLUMNS: tl.constexpr):
    """The activations' operand [32, COLUMNS] of one step, stored in lane order (prepare.py)."""
    PAIR: tl.constexpr = 1 if COLUMNS == 8 else 2
    lanes = tl.load(ptr + tl.arange(0, 32 * COLUMNS)).reshape(COLUMNS // (8 * PAIR), 8, 4, PAIR, 2, 4)
    return lanes.permute(2, 4, 5, 0, 3, 1).reshape(32, COLUMNS)


class RowScales(NamedTuple):
    """Row scales of one plane, from some row tile on."""

    ptr: Any  # uint8 or int16, block 0
    row_stride: Any  # entries between row tiles
    blocks: Any


@triton.jit
def load_row_scale(
    scales,
    first,
    PER_BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
):
    """Row scales of one plane, fp32 [32 · TILES, COLUMNS]; 0 in blocks that are not there.

    Output column n has the scale of block ``(first + n // SPAN) // PER_BLOCK``.

    Args:
        scales: of the plane, a `RowScales`.
        first: the column or slot the first output column belongs to.
        PER_BLOCK: columns or slots in a block.
        TILES: 1 or 2.
        COLUMNS: 4, 8 or 16.
    """
    if TILES == 2:
        upper = load_row_scale(scales, first, PER_BLOCK, SPAN, 1, COLUMNS, KIND)
        below = RowScales(scales.ptr + scales.row_stride, scales.row_stride, scales.blocks)
        lower = load_row_scale(below, first, PER_BLOCK, SPAN, 1, COLUMNS, KIND)
        return tl.join(upper, lower).permute(2, 0, 1).reshape(64, COLUMNS)
    elif COLUMNS > 4:
        HALF: tl.constexpr = COLUMNS // 2
        left = load_row_scale(scales, first, PER_BLOCK, SPAN, 1, HALF, KIND)
        right = load_row_scale(scales, first + HALF // SPAN, PER_BLOCK, SPAN, 1, HALF, KIND)
        return tl.join(left, right).permute(0, 2, 1).reshape(32, COLUMNS)
    else:
        # one dimension (g, q, r) of four entries to a lane: where lanes hold the products of a tile, without a move
        BLOCK_STRIDE: tl.constexpr = 32 * (KIND.base_planes + KIND.residual_planes)
        flat = tl.arange(0, 128)
        block = (first + flat // 4 % 4 // SPAN) // PER_BLOCK
        there = block < scales.blocks
        bits = tl.load(scales.ptr + block * BLOCK_STRIDE + flat // 16 * 4 + flat % 4, mask=there, other=0)
        scale = scale_of_bits(bits, KIND)
        return scale.reshape(8, 4, 4).permute(2, 0, 1).reshape(32, 4)


@triton.jit
def scale_of_bits(bits, KIND: tl.constexpr):
    """Stored row scales as fp32. Where the device lacks e4m3 the result is 2⁻⁸ of the scale (`scale_exponent_offset`):
    the bits are moved to where fp16 has sign, exponent and mantissa, whose exponent bias is larger by 8."""
    if not KIND.fp8:
        scale = bits.to(tl.float16, bitcast=True)
    elif KIND.native_fp8:
        scale = bits.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    elif KIND.asm:
        scale = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, c, d; prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424;"
            "shr.u32 c, a, 1; shr.u32 d, b, 1; and.b32 c, c, 0x3F803F80; and.b32 d, d, 0x3F803F80;"
            "lop3.b32 $0, a, 0x80008000, c, 0xEA; lop3.b32 $1, b, 0x80008000, d, 0xEA; }",
            "=r,=r,r",
            [bits],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        wide = bits.to(tl.int32)
        scale = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32)


@triton.jit
def scale_exponent_offset(KIND: tl.constexpr):
    """What the power of two of a row must make good (`scale_of_bits`)."""
    return 8 if KIND.fp8 and not KIND.native_fp8 else 0


@triton.jit
def load_tile_scale(scales, tiles, low_block, high_block, TILES: tl.constexpr, KIND: tl.constexpr):
    """Row scales of one plane and step, fp32 [TILES, g, q, r, h]: of ``low_block`` for the lower half of the step's
    columns, of ``high_block`` for the upper one; 0 in blocks that are not there.

    Args:
        scales: of the plane, a `RowScales`.
        tiles: row tiles that are there, from the first one.
    """
    BLOCK_STRIDE: tl.constexpr = 32 * (KIND.base_planes + KIND.residual_planes)
    flat = tl.arange(0, TILES * 128)
    place = flat // 128 * scales.row_stride + flat // 16 % 8 * 4 + flat % 4
    there = flat // 128 < tiles
    low = tl.load(scales.ptr + low_block * BLOCK_STRIDE + place, mask=there & (low_block < scales.blocks), other=0)
    high = tl.load(scales.ptr + high_block * BLOCK_STRIDE + place, mask=there & (high_block < scales.blocks), other=0)
    return tl.join(scale_of_bits(low, KIND), scale_of_bits(high, KIND)).reshape(TILES, 8, 4, 4, 2)


@triton.jit
def load_float_operands(
    tile_ptr,
    row_stride,
    tiles,
    scale,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    TILES: tl.constexpr,
    WIDE_LANES: tl.constexpr,
    KIND: tl.constexpr,
):
    """One step's operand [32 · TILES, 32]: ±scale in DTYPE.

    Args:
        tile_ptr: int32, the tile's first word in the first row tile.
        row_stride: words between row tiles.
        tiles: row tiles that are there, from the first one.
        scale: fp32 [TILES, g, q, r, h] (`load_tile_scale`).
        STEP: which 32 columns of the tile.
        WIDE_LANES: the order of columns (`operand_column`).

    Row order as in small_batch.py. Both are where lanes hold the words.
    """
    SIXTEEN: tl.constexpr = tl.bfloat16 == DTYPE or tl.float16 == DTYPE
    if KIND.asm and SIXTEEN:
        flat = tl.arange(0, TILES * 256)
        half_ptr = tile_ptr.to(tl.pointer_type(tl.int16))
        place = flat // 256 * (row_stride * 2) + flat % 256
        words = tl.load(half_ptr + place, mask=flat // 256 < tiles, other=0).reshape(TILES, 8, 4, 4, 2)
        half_scale = scale.to(DTYPE)
        i0 = _flip(words, half_scale, 15 - STEP)
        i1 = _flip(words, half_scale, 11 - STEP)
        i2 = _flip(words, half_scale, 7 - STEP)
        i3 = _flip(words, half_scale, 3 - STEP)
    else:
        flat = tl.arange(0, TILES * 128)
        place = flat // 128 * row_stride + flat % 128
        words = tl.load(tile_ptr + place, mask=flat // 128 < tiles, other=0).reshape(TILES, 8, 4, 4, 1)
        half = (16 * tl.arange(0, 2))[None, None, None, None, :]
        i0 = tl.where(((words >> (half + STEP)) & 1) != 0, scale, -scale).to(DTYPE)
        i1 = tl.where(((words >> (half + (4 + STEP))) & 1) != 0, scale, -scale).to(DTYPE)
        i2 = tl.where(((words >> (half + (8 + STEP))) & 1) != 0, scale, -scale).to(DTYPE)
        i3 = tl.where(((words >> (half + (12 + STEP))) & 1) != 0, scale, -scale).to(DTYPE)
    both = tl.join(tl.join(i0, i2), tl.join(i1, i3))  # [t, g, q, r, h, i // 2, i % 2]
    return float_operand(both, TILES, WIDE_LANES)


@triton.jit
def float_operand(values, TILES: tl.constexpr, WIDE_LANES: tl.constexpr):
    """Values of one step [TILES, g, q, r, h, i] as its operand [32 · TILES, 32], in the order of `operand_column`."""
    values = values.reshape(TILES, 8, 4, 2, 2, 2, 2, 2)  # t g q m z h i//2 i%2
    if WIDE_LANES:
        values = values.permute(3, 0, 4, 1, 2, 6, 7, 5)
    else:
        values = values.permute(3, 0, 4, 1, 6, 7, 2, 5)
    return values.reshape(TILES * 32, 32)


@triton.jit
def operand_row(first, TILES: tl.constexpr):
    """Which row of the layer stands at each place of a float operand, from the row ``first`` on: at 16 TILES m + 16 w +
    8 z + g row 32 w + 16 m + 8 z + g."""
    place = tl.arange(0, TILES * 32)
    return first + place // 16 % TILES * 32 + place // (16 * TILES) * 16 + place % 16


@triton.jit
def operand_column(kappa, WIDE_LANES: tl.constexpr):
    """Which of a step's 32 columns stands at place kappa of a float operand.

    Lanes hold columns 16 h + 4 q + i. A matrix instruction of four warps (Hopper) takes them in the order (i, q, h);
    for those of one warp the compiler chooses (q, i, h).
    """
    if WIDE_LANES:
        return kappa % 2 * 16 + kappa // 8 * 4 + kappa // 2 % 4
    else:
        return kappa % 2 * 16 + kappa // 2 % 4 * 4 + kappa // 8


@triton.jit
def _flip(words, scale, SHIFT: tl.constexpr):
    """The scale, with its sign bit inverted where a bit of the word is clear, two at a time: the bits of both halves
    are shifted to where the sign bits are."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $1, %d; lop3.b32 $0, t, 0x80008000, $2, 0xA6; }" % SHIFT,  # noqa: UP031 - no f-strings
        "=r,r,r",
        [words, scale],
        dtype=scale.dtype,
        is_pure=True,
        pack=2,
    )
