"""From a few tokens to the point where unpacking once pays: signs and row scales are made into 16-bit operands in
registers, activations come through shared memory, sums are fp32."""

import triton
import triton.language as tl

from .finish import finish
from .operand import load_float_operands, load_tile_scale, scale_exponent_offset


@triton.jit
def small_batch_kernel(
    weight_ptr,  # int32 [row tiles, column tiles, BASE, 128]
    residual_ptr,  # int32 [row tiles, slot tiles, RESIDUAL, 128]
    row_scale_ptr,  # uint8 or int16 [row tiles, blocks, planes, 32]
    row_exponent_ptr,  # int8 [rows padded]
    bias0_ptr,  # float [rows of the first of the stacked layers]
    bias1_ptr,
    bias2_ptr,
    bias3_ptr,
    x_ptr,  # float [column tiles + slot tiles, 4 steps, padded tokens, 32] (prepare.py)
    partial_ptr,  # fp32 [row programs · token programs, SPLIT, TOKENS, ROWS]
    counter_ptr,  # int32 [row programs · token programs], zero
    out0_ptr,  # float [tokens, rows of the first of the stacked layers] (finish.py)
    out1_ptr,
    out2_ptr,
    out3_ptr,
    tokens,
    padded,
    bound1,
    bound2,
    bound3,
    rows,
    row_tiles,
    column_tiles,
    slot_tiles,
    blocks,
    BASE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STACK: tl.constexpr,
    TILES: tl.constexpr,  # row tiles of a program: one for each warp
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE_LANES: tl.constexpr,
    PRECISION: tl.constexpr,
    ASM: tl.constexpr,
):
    row_program = tl.program_id(0)
    token_program = tl.program_id(1)
    part = tl.program_id(2)
    PLANES: tl.constexpr = BASE + RESIDUAL
    first_tile = row_program * TILES
    tiles = row_tiles - first_tile
    weight_stride = column_tiles * (BASE * 128)
    weight_ptr += first_tile.to(tl.int64) * weight_stride
    scale_stride = blocks * (PLANES * 32)
    row_scale_ptr += first_tile.to(tl.int64) * scale_stride
    token = token_program * TOKENS + tl.arange(0, TOKENS)
    x_place = x_ptr + token[:, None] * 32 + tl.arange(0, 32)[None, :]
    x_step = padded.to(tl.int64) * 32
    total = tl.zeros((TILES * 32, TOKENS), tl.float32)
    for tile in range(part * column_tiles // SPLIT, (part + 1) * column_tiles // SPLIT):
        for plane in tl.static_range(BASE):
            for step in tl.static_range(4):
                if step == 0 or BLOCK_SIZE % 128 != 0:
                    block = (tile * 128 + step * 32) // BLOCK_SIZE
                    scale = load_tile_scale(
                        row_scale_ptr + plane * 32,
                        scale_stride,
                        tiles,
                        block,
                        block,
                        blocks,
                        PLANES * 32,
                        TILES,
                        FP8,
                        NATIVE_FP8,
                        ASM,
                    )
                w = load_float_operands(
                    weight_ptr + (tile * BASE + plane) * 128,
                    weight_stride,
                    tiles,
                    scale,
                    step,
                    x_ptr.dtype.element_ty,
                    TILES,
                    WIDE_LANES,
                    ASM,
                )
                x = tl.load(x_place + (tile * 4 + step) * x_step)
                total = tl.dot(w, tl.trans(x), total, input_precision=PRECISION)
    if RESIDUAL > 0:
        residual_stride = slot_tiles * (RESIDUAL * 128)
        residual_ptr += first_tile.to(tl.int64) * residual_stride
        for tile in range(part * slot_tiles // SPLIT, (part + 1) * slot_tiles // SPLIT):
            for plane in tl.static_range(RESIDUAL):
                for step in tl.static_range(4):
                    slot = tile * 8 + step * 2
                    scale = load_tile_scale(
                        row_scale_ptr + (BASE + plane) * 32,
                        scale_stride,
                        tiles,
                        slot // SLOTS_PER_BLOCK,
                        (slot + 1) // SLOTS_PER_BLOCK,
                        blocks,
                        PLANES * 32,
                        TILES,
                        FP8,
                        NATIVE_FP8,
                        ASM,
                    )
                    w = load_float_operands(
                        residual_ptr + (tile * RESIDUAL + plane) * 128,
                        residual_stride,
                        tiles,
                        scale,
                        step,
                        x_ptr.dtype.element_ty,
                        TILES,
                        WIDE_LANES,
                        ASM,
                    )
                    x = tl.load(x_place + ((column_tiles + tile) * 4 + step) * x_step)
                    total = tl.dot(w, tl.trans(x), total, input_precision=PRECISION)
    # operand row 16 TILES m + 16 w + 8 z + g is row 32 w + 16 m + 8 z + g of the program
    place = tl.arange(0, TILES * 32)
    row = row_program * (TILES * 32) + place // 16 % TILES * 32 + place // (16 * TILES) * 16 + place % 16
    finish(
        total,
        row,
        token,
        row_program,
        token_program,
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
