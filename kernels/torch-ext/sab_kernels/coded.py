"""Coded planes: the two planes that are made of one stored plane u by xor of shifts along a row, ``P₁ + P₂ / 2``.

Both come of a stored word and the one before it in its row, in the natural order of columns: bit b of lane q's word is
column 32 q + b of the tile. Matrix operands take the columns of such a word two at a time, an odd one and the even one
before it, so the order of a coded layer's columns is another than that of other layers (`coded_column`):

    word x: bit 2 k + 1 is P₁ and bit 2 k is P₂ of column 2 k + 1        word y: the same of column 2 k

A pair of bits is the number 2 b₁ + b₂, which is 8-bit operand as it is: one logic operation leaves one pair in each of
four bytes. ``2 P₁ + P₂ = 2 (2 b₁ + b₂) − 3``.
"""

import triton
import triton.language as tl

from .operand import _flip, _rows, float_operand


@triton.jit
def coded_column(place):
    """Column of a tile that stands at a place 32 s + 16 h + 4 q + i of a coded layer's operands."""
    return place // 4 % 4 * 32 + place % 4 * 8 + place // 32 * 2 + place // 16 % 2


@triton.jit
def place_before(flat, KIND: tl.constexpr, PARTS: tl.constexpr):
    """Where the words lie that come before those of a tile in their rows, from the tile's first word on: a lane before,
    and for lane 0 in the tile before.

    Args:
        flat: place within the tile, in PARTS of a word.
    """
    LANE: tl.constexpr = 4 * PARTS
    first = flat // LANE % 4 == 0
    place = flat - LANE + tl.where(first, 4 * LANE - KIND.base_planes * (128 * PARTS), 0)
    return tl.max_contiguous(tl.multiple_of(place, LANE), LANE)  # four words in one load


@triton.jit
def word_before_is_there(flat, tile, PARTS: tl.constexpr):
    """False where a row starts."""
    return tl.max_constancy((flat // (4 * PARTS) % 4 > 0) | (tile > 0), 4 * PARTS)


@triton.jit
def derived_word(words, before, TAPS: tl.constexpr):
    """A derived plane's word, in the order of u: int32 as ``words`` and the words before them."""
    derived = words if TAPS % 2 == 1 else words & 0
    for k in tl.static_range(1, 32):
        if (TAPS >> k) % 2 == 1:
            carried = (before.to(tl.uint32, bitcast=True) >> (32 - k)).to(tl.int32, bitcast=True)
            derived = derived ^ ((words << k) | carried)
    return derived


@triton.jit
def load_coded_byte_operands(
    tile_ptr, row_stride, tile, TILES: tl.constexpr, CLASSES: tl.constexpr, KIND: tl.constexpr
):
    """8-bit operands [32 · TILES rows, 32] of the four steps of a tile: ``2 b₁ + b₂``, times a power of four.

    A pair of bits that is not the lowest of its byte is a number four, 16 or 64 times as large. It is shifted down, or
    left where it is: the steps are CLASSES runs, and the tokens of each run have sums of their own (prepare.py), which
    the kernel shifts once instead. The highest pair's upper bit is inverted, because a byte has a sign:
    ``64 (2 b₁ + b₂ − 2)``.

    Args:
        tile_ptr: int32, the first word of the first row tile.
        row_stride: words between row tiles.
        tile: of columns.
        CLASSES: 1, 2 or 4; the factor of run c is ``4^(4 c / CLASSES)``.
    """
    if KIND.asm:
        flat = tl.arange(0, TILES * 512)
        byte_ptr = tile_ptr.to(tl.pointer_type(tl.int8)) + flat // 512 * (row_stride * 4)
        within = flat % 512
        words = tl.load(byte_ptr + within).reshape(TILES, 8, 4, 4, 4)
        there = word_before_is_there(within, tile, 4)
        before = tl.load(byte_ptr + place_before(within, KIND, 4), mask=there, other=0).reshape(TILES, 8, 4, 4, 4)
        if CLASSES == 4:
            PAIRS: tl.constexpr = KIND.pair_words % -1061109568 + (  # 0xC0C0C0C0
                "and.b32 $0, y, 0x03030303; and.b32 $1, x, 0x03030303;"
                "and.b32 $2, y, 0x0C0C0C0C; and.b32 $3, x, 0x0C0C0C0C;"
                "and.b32 $4, y, 0x30303030; and.b32 $5, x, 0x30303030;"
                "and.b32 $6, y, 0xC0C0C0C0; and.b32 $7, x, 0xC0C0C0C0;"
            )
        elif CLASSES == 2:
            PAIRS: tl.constexpr = KIND.pair_words % 0 + (
                "and.b32 $0, y, 0x03030303; and.b32 $1, x, 0x03030303;"
                "and.b32 $4, y, 0x30303030; and.b32 $5, x, 0x30303030;"
                "shr.b32 y, y, 2; shr.b32 x, x, 2;"
                "and.b32 $2, y, 0x03030303; and.b32 $3, x, 0x03030303;"
                "and.b32 $6, y, 0x30303030; and.b32 $7, x, 0x30303030;"
            )
        else:
            PAIRS: tl.constexpr = KIND.pair_words % 0 + (
                "and.b32 $0, y, 0x03030303; and.b32 $1, x, 0x03030303; shr.b32 m, y, 2; shr.b32 t, x, 2;"
                "and.b32 $2, m, 0x03030303; and.b32 $3, t, 0x03030303; shr.b32 m, y, 4; shr.b32 t, x, 4;"
                "and.b32 $4, m, 0x03030303; and.b32 $5, t, 0x03030303; shr.b32 m, y, 6; shr.b32 t, x, 6;"
                "and.b32 $6, m, 0x03030303; and.b32 $7, t, 0x03030303;"
            )
        b0, b1, b2, b3, b4, b5, b6, b7 = tl.inline_asm_elementwise(
            "{ " + PAIRS + " }",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
            [words, before],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        flat = tl.arange(0, TILES * 128)
        word_ptr = tile_ptr + flat // 128 * row_stride
        within = flat % 128
        words = tl.load(word_ptr + within)
        there = word_before_is_there(within, tile, 1)
        before = tl.load(word_ptr + place_before(within, KIND, 1), mask=there, other=0)
        high = derived_word(words, before, KIND.code[0]).reshape(TILES, 8, 4, 4, 1)
        low = derived_word(words, before, KIND.code[1]).reshape(TILES, 8, 4, 4, 1)
        b0 = _pairs(high, low, 0, 0, CLASSES)
        b1 = _pairs(high, low, 0, 1, CLASSES)
        b2 = _pairs(high, low, 1, 0, CLASSES)
        b3 = _pairs(high, low, 1, 1, CLASSES)
        b4 = _pairs(high, low, 2, 0, CLASSES)
        b5 = _pairs(high, low, 2, 1, CLASSES)
        b6 = _pairs(high, low, 3, 0, CLASSES)
        b7 = _pairs(high, low, 3, 1, CLASSES)
    return _rows(b0, b1, TILES), _rows(b2, b3, TILES), _rows(b4, b5, TILES), _rows(b6, b7, TILES)


@triton.jit
def _pairs(high, low, step: tl.constexpr, half: tl.constexpr, CLASSES: tl.constexpr):
    shift = (2 * step + half + 8 * tl.arange(0, 4))[None, None, None, None, :]
    pair = ((high >> shift) & 1) * 2 + ((low >> shift) & 1)
    if CLASSES == 4 and step == 3:
        pair = pair - 2
    return (pair << (step * CLASSES // 4 * (8 // CLASSES))).to(tl.int8)


@triton.jit
def load_coded_float_operands(
    tile_ptr,
    row_stride,
    tile,
    tiles,
    scale,
    STEP: tl.constexpr,
    PART: tl.constexpr,
    DTYPE: tl.constexpr,
    TILES: tl.constexpr,
    WIDE_LANES: tl.constexpr,
    KIND: tl.constexpr,
):
    """One step's operand [32 · TILES, 32] in DTYPE: ``scale (±1 ± 1/2)``, or one plane of the two.

    Args:
        tile: of columns.
        PART: 0 for both planes together, 1 for the first, 2 for the second.

    The others as in `operand.load_float_operands`.
    """
    SIXTEEN: tl.constexpr = tl.bfloat16 == DTYPE or tl.float16 == DTYPE
    if KIND.asm and SIXTEEN:
        flat = tl.arange(0, TILES * 256)
        half_ptr = tile_ptr.to(tl.pointer_type(tl.int16)) + flat // 256 * (row_stride * 2)
        within = flat % 256
        inside = flat // 256 < tiles
        there = inside & word_before_is_there(within, tile, 2)
        words = tl.load(half_ptr + within, mask=inside, other=0)
        before = tl.load(half_ptr + place_before(within, KIND, 2), mask=there, other=0)
        low, high = tl.inline_asm_elementwise(
            "{ " + KIND.pair_words_of_halves % 0 + " prmt.b32 $0, y, x, 0x5410; prmt.b32 $1, y, x, 0x7632; }",
            "=&r,=&r,r,r",
            [words, before],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=2,
        )
        low = low.reshape(TILES, 8, 4, 4, 2)  # columns 0 to 15 of the word, then 16 to 31
        high = high.reshape(TILES, 8, 4, 4, 2)
        half_scale = scale.to(DTYPE)
        i0 = _flip_pair(low, half_scale, 14 - 2 * STEP, PART)
        i1 = _flip_pair(low, half_scale, 6 - 2 * STEP, PART)
        i2 = _flip_pair(high, half_scale, 14 - 2 * STEP, PART)
        i3 = _flip_pair(high, half_scale, 6 - 2 * STEP, PART)
    else:
        flat = tl.arange(0, TILES * 128)
        word_ptr = tile_ptr + flat // 128 * row_stride
        within = flat % 128
        inside = flat // 128 < tiles
        there = inside & word_before_is_there(within, tile, 1)
        words = tl.load(word_ptr + within, mask=inside, other=0)
        before = tl.load(word_ptr + place_before(within, KIND, 1), mask=there, other=0)
        first = derived_word(words, before, KIND.code[0]).reshape(TILES, 8, 4, 4, 1)
        second = derived_word(words, before, KIND.code[1]).reshape(TILES, 8, 4, 4, 1)
        i0 = _signed_pair(first, second, scale, 2 * STEP, PART).to(DTYPE)
        i1 = _signed_pair(first, second, scale, 2 * STEP + 8, PART).to(DTYPE)
        i2 = _signed_pair(first, second, scale, 2 * STEP + 16, PART).to(DTYPE)
        i3 = _signed_pair(first, second, scale, 2 * STEP + 24, PART).to(DTYPE)
    both = tl.join(tl.join(i0, i2), tl.join(i1, i3))  # [t, g, q, r, h, i // 2, i % 2]
    return float_operand(both, TILES, WIDE_LANES)


@triton.jit
def _signed_pair(first, second, scale, bit: tl.constexpr, PART: tl.constexpr):
    at = bit + tl.arange(0, 2)[None, None, None, None, :]
    high = tl.where(((first >> at) & 1) != 0, scale, -scale)
    low = tl.where(((second >> at) & 1) != 0, scale, -scale) * 0.5
    return high + low if PART == 0 else (high if PART == 1 else low)


@triton.jit
def _flip_pair(words, scale, SHIFT: tl.constexpr, PART: tl.constexpr):
    """The same of pairs of bits, two at a time: those in either half of a word, which SHIFT brings to the top."""
    if PART == 1:
        return _flip(words, scale, SHIFT)
    elif PART == 2:
        return _flip(words, (scale * 0.5).to(scale.dtype), SHIFT + 1)
    else:
        FLIPS: tl.constexpr = (
            "{ .reg .b32 t, s, h; shl.b32 t, $1, %d; shl.b32 s, t, 1;"  # noqa: UP031 - no f-strings
            "lop3.b32 t, t, 0x80008000, $2, 0xA6; lop3.b32 s, s, 0x80008000, $2, 0xA6;" % SHIFT
        )
        if scale.dtype == tl.bfloat16:
            SUM: tl.constexpr = "mov.b32 h, 0x3F003F00; fma.rn.bf16x2 $0, s, h, t; }"  # two halves
        else:
            SUM: tl.constexpr = "mov.b32 h, 0x38003800; fma.rn.f16x2 $0, s, h, t; }"
        return tl.inline_asm_elementwise(
            FLIPS + SUM,
            "=r,r,r",
            [words, scale],
            dtype=scale.dtype,
            is_pure=True,
            pack=2,
        )
