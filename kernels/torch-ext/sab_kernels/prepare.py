"""What a product does to its activations first: multiply by the column scales, gather the salient columns, and put
everything into the order of the packed signs. Layers that share an input and its scales share this."""

import triton
import triton.language as tl

from .operand import operand_column

# 2²³ + 2²² as an int32 bit pattern: an integer below 2²² added to it is, read as fp32, 12582912 plus that integer.
FLOAT_OFFSET_BITS = tl.constexpr(0x4B400000)


@triton.jit
def load_half(ptr, mask):
    """fp16 values whose bits are stored as int16, as fp32; 0 outside the mask."""
    return tl.load(ptr, mask=mask, other=0).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def integer_limbs(x, TOKENS: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr):
    """x [TOKENS, GROUPS · SPAN] as ``unit · (128 · high + low)``, one unit per token and call.

    The unit is a power of two under which the largest magnitude has 14 bits. The sum over each of the GROUPS runs of
    SPAN columns is made even (one column of a run moves by one unit), because half of it starts an accumulator.

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
def prepare_limbs_kernel(
    x_ptr,  # float [tokens, columns]
    column_scale_ptr,  # int16 [column tiles · 128]: fp16 bits
    index_ptr,  # int32 [slot tiles · 128]
    base_limb_ptr,  # int8 [column tiles, 4 steps, 64 · TOKENS]: matrix operands in lane order
    base_start_ptr,  # int32 [column tiles, groups, TOKENS, 2]: accumulator start of high and low limb
    base_unit_ptr,  # fp32 [column tiles, TOKENS]: −2 · unit
    slot_limb_ptr,  # int8 [slot tiles, 4 steps, 128 · SLOT_TOKENS]
    slot_start_ptr,  # int32 [slot tiles, 4 steps, 2 slots, SLOT_TOKENS, 2]
    slot_unit_ptr,  # fp32 [slot tiles, 4 steps, 2 slots, SLOT_TOKENS]
    counter_ptr,  # int32 [counters], zeroed
    tokens,
    columns,
    stride,  # of x between tokens
    column_tiles,
    counters,
    COUNTERS_EACH: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOT_TOKENS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    mine = tile * COUNTERS_EACH + tl.arange(0, COUNTERS_EACH)
    tl.store(counter_ptr + mine, tl.zeros((COUNTERS_EACH,), tl.int32), mask=mine < counters)
    place = tl.arange(0, 128)
    step = place // 32
    half = place // 16 % 2
    quad = place // 4 % 4
    if tile < column_tiles:
        GROUPS: tl.constexpr = 128 // SCALE_COLUMNS
        token = tl.arange(0, TOKENS)
        column = tile * 128 + place
        x = tl.load(
            x_ptr + token.to(tl.int64)[:, None] * stride + column[None, :],
            mask=(token < tokens)[:, None] & (column < columns)[None, :],
            other=0.0,
        ).to(tl.float32)
        x = x * load_half(column_scale_ptr + column, column >= 0)[None, :]
        high, low, total, unit = integer_limbs(x, TOKENS, GROUPS, SCALE_COLUMNS)
        # operands hold −b for the bits of steps 0 to 2 and 1 − b for those of step 3 (decode.py): take that back
        last = tl.where((step == 3)[None, :], 128 * high + low, 0).reshape(TOKENS, GROUPS, SCALE_COLUMNS)
        start = (total >> 1) - tl.sum(last, axis=2)
        group = tl.arange(0, GROUPS)
        to = base_start_ptr + ((tile * GROUPS + group)[None, :] * TOKENS + token[:, None]) * 2
        tl.store(to, tl.zeros((TOKENS, GROUPS), tl.int32))
        tl.store(to + 1, start + FLOAT_OFFSET_BITS)
        tl.store(base_unit_ptr + tile * TOKENS + token, -2.0 * unit)
        lane = (2 * (token % 4))[:, None] * 4 + quad[None, :]  # of the high limb; the low limb is 4 lanes on
        within = (token // 4)[:, None] * 8 + (half * 4 + place % 4)[None, :]
        at = base_limb_ptr + (tile * 4 + step)[None, :] * (64 * TOKENS) + lane * (2 * TOKENS) + within
        tl.store(at, high.to(tl.int8))
        tl.store(at + 8 * TOKENS, low.to(tl.int8))
    else:
        slot_tile = tile - column_tiles
        token = tl.arange(0, SLOT_TOKENS)
        column = tl.load(index_ptr + slot_tile * 128 + place)
        inside = column >= 0
        x = tl.load(
            x_ptr + token.to(tl.int64)[:, None] * stride + column[None, :],
            mask=(token < tokens)[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        x = x * load_half(column_scale_ptr + column, inside)[None, :]
        # every slot has a unit of its own
        rows: tl.constexpr = SLOT_TOKENS * 8
        high, low, total, unit = integer_limbs(x.reshape(rows, 16), rows, 1, 16)
        total = total.reshape(SLOT_TOKENS, 8)
        slot = tl.arange(0, 8)
        start = tl.where((slot // 2 == 3)[None, :], -(total >> 1), total >> 1)
        PAIRS: tl.constexpr = 2 * SLOT_TOKENS
        pair = (slot % 2)[None, :] * SLOT_TOKENS + token[:, None]
        entry = (slot_tile * 4 + slot // 2)[None, :] * PAIRS + pair
        tl.store(slot_start_ptr + entry * 2, tl.zeros((SLOT_TOKENS, 8), tl.int32))
        tl.store(slot_start_ptr + entry * 2 + 1, start + FLOAT_OFFSET_BITS)
        tl.store(slot_unit_ptr + entry, -2.0 * unit.reshape(SLOT_TOKENS, 8))
        high = high.reshape(SLOT_TOKENS, 128)
        low = low.reshape(SLOT_TOKENS, 128)
        for other in tl.static_range(2):
            # a step's 32 rows are two slots with accumulators of their own: each slot is zero in the other's columns
            owner = half if other == 0 else 1 - half
            mate = owner[None, :] * SLOT_TOKENS + token[:, None]
            lane = (2 * (mate % 4)) * 4 + quad[None, :]
            within = (mate // 4) * 8 + (half * 4 + place % 4)[None, :]
            at = slot_limb_ptr + (slot_tile * 4 + step)[None, :] * (64 * PAIRS) + lane * (2 * PAIRS) + within
            tl.store(at, high.to(tl.int8) if other == 0 else tl.zeros((SLOT_TOKENS, 128), tl.int8))
            tl.store(at + 8 * PAIRS, low.to(tl.int8) if other == 0 else tl.zeros((SLOT_TOKENS, 128), tl.int8))


@triton.jit
def prepare_floats_kernel(
    x_ptr,  # float [tokens, columns]
    column_scale_ptr,  # int16 [column tiles · 128]
    index_ptr,  # int32 [slot tiles · 128]
    out_ptr,  # float [column tiles + slot tiles, 4 steps, padded tokens, 32]
    counter_ptr,  # int32 [counters], zeroed
    tokens,
    padded,
    columns,
    stride,
    column_tiles,
    counters,
    COUNTERS_EACH: tl.constexpr,
    TOKENS: tl.constexpr,  # tokens of one program
    WIDE_LANES: tl.constexpr,
):
    tile = tl.program_id(0)
    program = tile * tl.num_programs(1) + tl.program_id(1)
    mine = program * COUNTERS_EACH + tl.arange(0, COUNTERS_EACH)
    tl.store(counter_ptr + mine, tl.zeros((COUNTERS_EACH,), tl.int32), mask=mine < counters)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    place = tl.arange(0, 128)
    step = place // 32
    kappa = place % 32
    within = step * 32 + operand_column(kappa, WIDE_LANES)
    if tile < column_tiles:
        column = tile * 128 + within
        column = tl.where(column < columns, column, -1)
    else:
        column = tl.load(index_ptr + (tile - column_tiles) * 128 + within)
    inside = column >= 0
    x = tl.load(
        x_ptr + token.to(tl.int64)[:, None] * stride + column[None, :],
        mask=(token < tokens)[:, None] & inside[None, :],
        other=0.0,
    ).to(tl.float32)
    x = x * load_half(column_scale_ptr + column, inside)[None, :]
    at = out_ptr + ((tile * 4 + step).to(tl.int64)[None, :] * padded + token[:, None]) * 32 + kappa[None, :]
    tl.store(at, x.to(out_ptr.dtype.element_ty), mask=(token < padded)[:, None])
