"""Activations as 8-bit integers, in the order of the packed signs: what a product of a few tokens does first."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import LimbOperand
from .coded import coded_column
from .product import Product
from .scaled import dense_rows, load_scaled, zero_counters, zeroing

# 2²³ + 2²² as an int32 bit pattern: an integer below 2²² added to it is, read as fp32, 12582912 plus that integer.
FLOAT_OFFSET_BITS = tl.constexpr(0x4B400000)


@triton.jit
def integer_limbs(x, TOKENS: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr):
    """x [TOKENS, GROUPS · SPAN] as ``unit · (128 · high + low)``, one unit per token and call.

    The unit is a power of two under which the largest magnitude has 14 bits. The sum over each of the GROUPS runs of
    SPAN columns is made even (one column of a run moves by one unit), because half of it is added to the sum over bits.

    Returns:
        high int32 in [−128, 127], low int32 in [0, 127], sum int32 [TOKENS, GROUPS], unit fp32 [TOKENS]; the unit is
        NaN where x is not finite.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    peak = tl.max(bits, axis=1)  # of bit patterns: ordered like the magnitudes, NaN above all
    exponent = tl.maximum((peak >> 23) - 13, 1)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    value = tl.floor(x * inverse[:, None] + 0.5)
    q = tl.minimum(tl.maximum(value, -16384.0), 16383.0).to(tl.int32)
    q = tl.where((peak >= 0x7F800000)[:, None], 0, q).reshape(TOKENS, GROUPS, SPAN)
    odd = (tl.sum(q, axis=2) & 1)[:, :, None]
    first = (tl.arange(0, SPAN) == 0)[None, None, :]
    q = tl.where(first, q + tl.where(q > 0, -odd, odd), q)
    total = tl.sum(q, axis=2)
    q = q.reshape(TOKENS, GROUPS * SPAN)
    unit = tl.where(peak >= 0x7F800000, 0x7FC00000, exponent << 23).to(tl.float32, bitcast=True)
    return q >> 7, q & 127, total, unit


@triton.jit
def _store_limbs(limb_ptr, tile, column, high, low, COLUMNS: tl.constexpr):
    """Two columns of the operand [32, 2 · COLUMNS] of every step, in lane order: lanes (n % 8, q) hold 16 bytes
    (n // 8 % 2, h, i) of two groups of 8 columns, or 8 bytes where there is one; then come the next two groups.

    Args:
        limb_ptr: int8 [tiles, 4 steps, 64 · COLUMNS].
        column: int32 [values, 128 or 1]: pairs of columns, below COLUMNS.
        high, low: int32 [values, 128]: limbs of a tile's columns.
    """
    LANE: tl.constexpr = 8 if COLUMNS == 4 else 16  # bytes
    place = tl.arange(0, 128)[None, :]
    group = column // 4
    lane = column % 4 * 8 + place // 4 % 4  # of the high limb; the low limb is one column, four lanes, on
    within = group % 2 * 8 + place // 16 % 2 * 4 + place % 4
    at = limb_ptr + (tile * 4 + place // 32) * (64 * COLUMNS) + group // 2 * 512 + lane * LANE + within
    tl.store(at, high.to(tl.int8))
    tl.store(at + 4 * LANE, low.to(tl.int8))


@triton.jit
def _prepare_columns(inputs, operand, row, tile, TOKENS: tl.constexpr, SCALE_COLUMNS: tl.constexpr):
    GROUPS: tl.constexpr = 128 // SCALE_COLUMNS
    token = tl.arange(0, TOKENS)
    place = tl.arange(0, 128)
    column = tile * 128 + place
    x = load_scaled(inputs, tl.where(column < inputs.columns, column, -1), row)
    high, low, total, unit = integer_limbs(x, TOKENS, GROUPS, SCALE_COLUMNS)
    # operands hold −b for the bits of steps 0 to 2 and 1 − b for those of step 3 (operand.py): take that back
    last = tl.where((place // 32 == 3)[None, :], 128 * high + low, 0).reshape(TOKENS, GROUPS, SCALE_COLUMNS)
    start = (total >> 1) - tl.sum(last, axis=2)
    entry = (tile * GROUPS + tl.arange(0, GROUPS))[None, :] * TOKENS + token[:, None]
    tl.store(operand.start + entry, start + FLOAT_OFFSET_BITS)
    tl.store(operand.unit + tile * TOKENS + token, -2.0 * unit)
    _store_limbs(operand.limb, tile, token[:, None], high, low, TOKENS)


@triton.jit
def _prepare_coded_columns(inputs, operand, row, tile, TOKENS: tl.constexpr, CLASSES: tl.constexpr):
    """The steps are CLASSES runs, each of which has places of its own: run c of token t is place
    ``TOKENS / CLASSES · c + t``, and zero in the columns of other runs."""
    EACH: tl.constexpr = TOKENS // CLASSES
    SPAN: tl.constexpr = 128 // CLASSES
    token = tl.arange(0, EACH)
    place = tl.arange(0, 128)
    column = tile * 128 + coded_column(place)
    x = load_scaled(inputs, tl.where(column < inputs.columns, column, -1), row)
    high, low, total, unit = integer_limbs(x, EACH, CLASSES, SPAN)
    half = total >> 1
    run = tl.arange(0, CLASSES)[None, :]
    entry = tile * (2 * TOKENS) + run * EACH + token[:, None]
    # operands hold 2 b₁ + b₂, and 2 less in the last of four runs; half of 2 P₁ + P₂ is 3/2 less
    start = tl.where((CLASSES == 4) & (run == 3), half, -3 * half)
    tl.store(operand.start + entry, start + FLOAT_OFFSET_BITS)
    tl.store(operand.unit + entry, unit[:, None] + tl.zeros((EACH, CLASSES), tl.float32))
    # for planes beside the coded one, as in `_prepare_columns`
    last = tl.where((place // 32 == 3)[None, :], 128 * high + low, 0).reshape(EACH, CLASSES, SPAN)
    tl.store(operand.start + entry + TOKENS, half - tl.sum(last, axis=2) + FLOAT_OFFSET_BITS)
    tl.store(operand.unit + entry + TOKENS, -2.0 * unit[:, None] + tl.zeros((EACH, CLASSES), tl.float32))
    for c in tl.static_range(CLASSES):
        mine = (place // SPAN == c)[None, :]
        at = c * EACH + token[:, None]
        _store_limbs(operand.limb, tile, at, tl.where(mine, high, 0), tl.where(mine, low, 0), TOKENS)


@triton.jit
def _prepare_slots(inputs, operand, row, tile, TOKENS: tl.constexpr):
    PAIRS: tl.constexpr = 2 * TOKENS
    SLOTS: tl.constexpr = 8 * TOKENS
    token = tl.arange(0, TOKENS)
    place = tl.arange(0, 128)
    x = load_scaled(inputs, tl.load(inputs.residual_index + tile * 128 + place), row)
    # every slot has a unit of its own
    high, low, total, unit = integer_limbs(x.reshape(SLOTS, 16), SLOTS, 1, 16)
    total = total.reshape(TOKENS, 8)
    slot = tl.arange(0, 8)[None, :]
    start = tl.where(slot // 2 == 3, -(total >> 1), total >> 1)
    entry = (tile * 4 + slot // 2) * PAIRS + slot % 2 * TOKENS + token[:, None]
    tl.store(operand.start + entry, start + FLOAT_OFFSET_BITS)
    tl.store(operand.unit + entry, -2.0 * unit.reshape(TOKENS, 8))
    # a step's 32 rows are two slots with accumulators of their own: each is zero in the columns of the other
    high = high.reshape(TOKENS, 128)
    low = low.reshape(TOKENS, 128)
    half = (place // 16 % 2)[None, :]
    zero = tl.zeros((TOKENS, 128), tl.int32)
    _store_limbs(operand.limb, tile, half * TOKENS + token[:, None], high, low, PAIRS)
    _store_limbs(operand.limb, tile, (1 - half) * TOKENS + token[:, None], zero, zero, PAIRS)


@triton.jit
def prepare_tile(
    inputs,  # Activations
    columns,  # LimbOperand
    slots,  # LimbOperand
    row,  # int [TOKENS, of a coded layer TOKENS / CLASSES]: of x, or −1
    slot_row,  # int [SLOT_TOKENS]
    tile,  # of the columns, then of the slots
    column_tiles,
    TOKENS: tl.constexpr,
    SLOT_TOKENS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Write what decode.py reads of one tile."""
    if tile < column_tiles:
        if CLASSES == 0:
            _prepare_columns(inputs, columns, row, tile, TOKENS, SCALE_COLUMNS)
        else:
            _prepare_coded_columns(inputs, columns, row, tile, TOKENS, CLASSES)
    else:
        _prepare_slots(inputs, slots, slot_row, tile - column_tiles, SLOT_TOKENS)


@triton.jit
def prepare_limbs_kernel(
    inputs,  # Activations
    columns,  # LimbOperand
    slots,  # LimbOperand
    counter_ptr,  # int32 [counters], zeroed
    counters,
    column_tiles,
    COUNTERS_EACH: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOT_TOKENS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr = 0,  # of a coded layer
):
    """For decode.py. One program for each tile of columns, then one for each tile of slots."""
    tile = tl.program_id(0)
    zero_counters(counter_ptr, tile, counters, COUNTERS_EACH)
    prepare_tile(
        inputs,
        columns,
        slots,
        dense_rows(inputs, 0, TOKENS if CLASSES == 0 else TOKENS // CLASSES),
        dense_rows(inputs, 0, SLOT_TOKENS),
        tile,
        column_tiles,
        TOKENS,
        SLOT_TOKENS,
        SCALE_COLUMNS,
        CLASSES,
    )


def prepare_limbs(
    product: Product, counter: Tensor, tokens: int, slot_tokens: int, classes: int
) -> tuple[LimbOperand, LimbOperand]:
    """The activations of the columns, padded to ``tokens``, and of the slots, padded to ``slot_tokens``; zeroes
    ``counter``. A coded layer's columns are in ``classes`` runs (coded.py)."""
    geometry, space = product.geometry, product.space
    tiles, slot_tiles = geometry.column_tiles, geometry.slot_tiles
    columns = LimbOperand(
        space(tiles, 256 * tokens, dtype=torch.int8),
        space(tiles, 2 if geometry.code else 128 // geometry.scale_columns, tokens, dtype=torch.int32),
        space(tiles, 2 if geometry.code else 1, tokens, dtype=torch.float32),
    )
    slots = LimbOperand(
        space(slot_tiles, 512 * slot_tokens, dtype=torch.int8),
        space(slot_tiles, 4, 2, slot_tokens, dtype=torch.int32),
        space(slot_tiles, 4, 2, slot_tokens, dtype=torch.float32),
    )
    prepare_limbs_kernel[(tiles + slot_tiles,)](
        product.inputs,
        columns,
        slots,
        **zeroing(counter, tiles + slot_tiles),
        column_tiles=tiles,
        TOKENS=tokens,
        SLOT_TOKENS=slot_tokens,
        SCALE_COLUMNS=geometry.scale_columns,
        CLASSES=classes if geometry.code else 0,
    )
    return columns, slots
