"""A few tokens: the packed signs go through the matrix unit as 8-bit integers.

The activations of a block are integers of 15 bits under one unit, split into two 8-bit limbs that are two columns of
the operand, so the signed sum of a block is exact; the error is that of rounding x to 15 bits, which is less than what
bf16 loses. Weights are loaded once, in the order in which lanes hold them, and unpacked four by one instruction.
"""

import triton
import triton.language as tl

from .finish import finish
from .operand import load_byte_operands, load_limb_operand, load_row_scale, scale_exponent_offset


@triton.jit
def _signed_sums(accumulator, start, unit, PAIRS: tl.constexpr):
    """Accumulators of high and low limbs to ``unit · Σ B q``, fp32 [rows, PAIRS].

    ``start`` carries a float's exponent (prepare.py), so the integer is read as a float without a conversion. ``unit``
    is a power of two: every step is exact.
    """
    high, low = tl.split(accumulator.reshape(accumulator.shape[0], PAIRS, 2))
    value = (high * 128 + (low + start[None, :])).to(tl.float32, bitcast=True)
    return value * unit[None, :] + (unit * -12582912.0)[None, :]


@triton.jit
def decode_kernel(
    weight_ptr,  # int32 [row tiles, column tiles, BASE, 128]
    residual_ptr,  # int32 [row tiles, slot tiles, RESIDUAL, 128]
    row_scale_ptr,  # uint8 or int16 [row tiles, blocks, planes, 32]
    row_exponent_ptr,  # int8 [rows]
    bias0_ptr,  # float [rows of the first of the stacked layers]
    bias1_ptr,
    bias2_ptr,
    bias3_ptr,
    base_limb_ptr,
    base_start_ptr,
    base_unit_ptr,
    slot_limb_ptr,
    slot_start_ptr,
    slot_unit_ptr,
    partial_ptr,  # fp32 [SPLIT, SLOT_TOKENS, rows padded]
    counter_ptr,  # int32 [programs along rows], zero
    out0_ptr,  # float [tokens, rows of the first of the stacked layers] (finish.py)
    out1_ptr,
    out2_ptr,
    out3_ptr,
    tokens,
    bound1,
    bound2,
    bound3,
    rows,
    column_tiles,
    slot_tiles,
    blocks,
    even,
    pair,
    ones,
    BASE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STACK: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOT_TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,
    ASM: tl.constexpr,
):
    row_program = tl.program_id(0)
    part = tl.program_id(1)
    ROWS: tl.constexpr = TILES * 32
    PLANES: tl.constexpr = BASE + RESIDUAL
    GROUPS: tl.constexpr = 128 // SCALE_COLUMNS
    LIMBS: tl.constexpr = 2 * TOKENS
    row_tile = (row_program * TILES).to(tl.int64)
    weight_stride = column_tiles * (BASE * 128)
    weight_ptr += row_tile * weight_stride
    scale_stride = blocks * (PLANES * 32)
    row_scale_ptr += row_tile * scale_stride
    token = tl.arange(0, TOKENS)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for tile in tl.range(part * column_tiles // SPLIT, (part + 1) * column_tiles // SPLIT, loop_unroll_factor=UNROLL):
        limb_ptr = base_limb_ptr + tile * (128 * LIMBS)
        x0 = load_limb_operand(limb_ptr, LIMBS)
        x1 = load_limb_operand(limb_ptr + 32 * LIMBS, LIMBS)
        x2 = load_limb_operand(limb_ptr + 64 * LIMBS, LIMBS)
        x3 = load_limb_operand(limb_ptr + 96 * LIMBS, LIMBS)
        unit = tl.load(base_unit_ptr + tile * TOKENS + token)
        start_ptr = base_start_ptr + tile * (GROUPS * TOKENS) + token
        for plane in tl.static_range(BASE):
            w0, w1, w2, w3 = load_byte_operands(
                weight_ptr + (tile * BASE + plane) * 128, weight_stride, even, pair, ones, TILES, ASM
            )
            acc = tl.zeros((ROWS, LIMBS), tl.int32)
            for step in tl.static_range(4):
                w = w0 if step == 0 else (w1 if step == 1 else (w2 if step == 2 else w3))
                x = x0 if step == 0 else (x1 if step == 1 else (x2 if step == 2 else x3))
                acc = tl.dot(w, x, acc, out_dtype=tl.int32)
                if (step + 1) * GROUPS % 4 == 0:  # the row scale may change here
                    scale = load_row_scale(
                        row_scale_ptr + plane * 32,
                        scale_stride,
                        tile * 128 + step * 32,
                        blocks,
                        PLANES * 32,
                        BLOCK_SIZE,
                        LIMBS,
                        TILES,
                        4,
                        FP8,
                        NATIVE_FP8,
                        ASM,
                    )
                    scale = tl.broadcast_to(scale[:, None, :], (ROWS, TOKENS // 4, 4)).reshape(ROWS, TOKENS)
                    start = tl.load(start_ptr + ((step + 1) * GROUPS // 4 - 1) * TOKENS)
                    total += _signed_sums(acc, start, unit, TOKENS) * scale
                    if step < 3:
                        acc = tl.zeros((ROWS, LIMBS), tl.int32)
    total = tl.sum(total.reshape(ROWS, TOKENS // SLOT_TOKENS, SLOT_TOKENS), axis=1)  # tokens past SLOT_TOKENS are 0
    if RESIDUAL > 0:
        PAIRS: tl.constexpr = 2 * SLOT_TOKENS
        residual_stride = slot_tiles * (RESIDUAL * 128)
        residual_ptr += row_tile * residual_stride
        rest = tl.zeros((ROWS, PAIRS), tl.float32)
        for tile in tl.range(part * slot_tiles // SPLIT, (part + 1) * slot_tiles // SPLIT):
            for plane in tl.static_range(RESIDUAL):
                w0, w1, w2, w3 = load_byte_operands(
                    residual_ptr + (tile * RESIDUAL + plane) * 128, residual_stride, even, pair, ones, TILES, ASM
                )
                for step in tl.static_range(4):
                    entry = tile * 4 + step
                    x = load_limb_operand(slot_limb_ptr + entry * (64 * PAIRS), 2 * PAIRS)
                    w = w0 if step == 0 else (w1 if step == 1 else (w2 if step == 2 else w3))
                    acc = tl.dot(w, x, out_dtype=tl.int32)
                    start = tl.load(slot_start_ptr + entry * PAIRS + tl.arange(0, PAIRS))
                    unit = tl.load(slot_unit_ptr + entry * PAIRS + tl.arange(0, PAIRS))
                    scale = load_row_scale(
                        row_scale_ptr + (BASE + plane) * 32,
                        scale_stride,
                        entry * 2,
                        blocks,
                        PLANES * 32,
                        SLOTS_PER_BLOCK,
                        SLOT_TOKENS,
                        TILES,
                        PAIRS,
                        FP8,
                        NATIVE_FP8,
                        ASM,
                    )
                    rest += _signed_sums(acc, start, unit, PAIRS) * scale
        total += tl.sum(rest.reshape(ROWS, 2, SLOT_TOKENS), axis=1)
    finish(
        total,
        row_program * ROWS + tl.arange(0, ROWS),
        tl.arange(0, SLOT_TOKENS),
        row_program,
        0,
        part,
        partial_ptr,
        counter_ptr,
        row_exponent_ptr,
        bias0_ptr,
        bias1_ptr,
        bias2_ptr,
        bias3_ptr,
        out0_ptr,
        out1_ptr,
        out2_ptr,
        out3_ptr,
        tokens,
        bound1,
        bound2,
        bound3,
        rows,
        scale_exponent_offset(FP8, NATIVE_FP8),
        FP8,
        HAS_BIAS,
        STACK,
        SPLIT,
    )
