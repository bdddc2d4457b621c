"""From a few tokens to the point where unpacking once pays: signs and row scales are made into 16-bit operands in
registers, activations come through shared memory, sums are fp32."""

import torch
import triton
import triton.language as tl

from .arguments import Stack
from .coded import load_coded_float_operands
from .finish import finish
from .geometry import ceil_div
from .operand import RowScales, load_float_operands, load_tile_scale, operand_row
from .prepare_floats import prepare_floats
from .product import Product
from .tuning import Launch


@triton.jit
def small_batch_sums(
    layer,  # PackedRows
    x_ptr,  # float [column tiles + slot tiles, 4 steps, padded tokens, 32] (prepare_floats.py)
    token,  # int32 [TOKENS]: which of them
    padded,
    row_tiles,
    extent,  # Extent
    row_program,
    part,
    KIND: tl.constexpr,
    TILES: tl.constexpr,  # row tiles of a program: one for each warp
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE_LANES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over one of SPLIT parts of the columns, fp32 [32 · TILES rows, TOKENS] (`operand_row`): without the power of
    two of a row, and without its bias."""
    BASE: tl.constexpr = KIND.base_planes
    RESIDUAL: tl.constexpr = KIND.residual_planes
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    # fp16 cannot hold 3/2 of every fp16 scale: then a coded plane's two planes go one after the other
    PARTS: tl.constexpr = 1 if KIND.fp8 or tl.float16 != DTYPE else 2
    first_tile = row_program * TILES
    tiles = row_tiles - first_tile
    weight_stride = extent.column_tiles * (BASE * 128)
    weight_ptr = layer.weight + first_tile.to(tl.int64) * weight_stride
    scale_stride = extent.blocks * ((BASE + RESIDUAL) * 32)
    row_scale_ptr = layer.row_scale + first_tile.to(tl.int64) * scale_stride
    x_place = x_ptr + token[:, None] * 32 + tl.arange(0, 32)[None, :]
    x_step = tl.cast(padded, tl.int64) * 32  # a size of 1 is a constant
    total = tl.zeros((TILES * 32, TOKENS), tl.float32)
    for tile in range(part * extent.column_tiles // SPLIT, (part + 1) * extent.column_tiles // SPLIT):
        for plane in tl.static_range(BASE):
            for step in tl.static_range(4):
                if step == 0 or KIND.block_size % 128 != 0:
                    block = (tile * 128 + step * 32) // KIND.block_size
                    scales = RowScales(row_scale_ptr + plane * 32, scale_stride, extent.blocks)
                    scale = load_tile_scale(scales, tiles, block, block, TILES, KIND)
                tile_ptr = weight_ptr + (tile * BASE + plane) * 128
                if len(KIND.code) == 0 or plane > 0:
                    w = load_float_operands(tile_ptr, weight_stride, tiles, scale, step, DTYPE, TILES, WIDE_LANES, KIND)
                    x = tl.load(x_place + (tile * 4 + step) * x_step)
                    total = tl.dot(w, tl.trans(x), total, input_precision=PRECISION)
                else:
                    for part_of_pair in tl.static_range(PARTS):
                        w = load_coded_float_operands(
                            tile_ptr,
                            weight_stride,
                            tile,
                            tiles,
                            scale,
                            step,
                            0 if PARTS == 1 else part_of_pair + 1,
                            DTYPE,
                            TILES,
                            WIDE_LANES,
                            KIND,
                        )
                        x = tl.load(x_place + (tile * 4 + step) * x_step)
                        total = tl.dot(w, tl.trans(x), total, input_precision=PRECISION)
    if RESIDUAL > 0 and KIND.slots_per_block > 0:
        residual_stride = extent.slot_tiles * (RESIDUAL * 128)
        residual_ptr = layer.residual_sign + first_tile.to(tl.int64) * residual_stride
        for tile in range(part * extent.slot_tiles // SPLIT, (part + 1) * extent.slot_tiles // SPLIT):
            for plane in tl.static_range(RESIDUAL):
                for step in tl.static_range(4):
                    slot = tile * 8 + step * 2
                    scales = RowScales(row_scale_ptr + (BASE + plane) * 32, scale_stride, extent.blocks)
                    block, next_block = slot // KIND.slots_per_block, (slot + 1) // KIND.slots_per_block
                    scale = load_tile_scale(scales, tiles, block, next_block, TILES, KIND)
                    tile_ptr = residual_ptr + (tile * RESIDUAL + plane) * 128
                    w = load_float_operands(
                        tile_ptr, residual_stride, tiles, scale, step, DTYPE, TILES, WIDE_LANES, KIND
                    )
                    x = tl.load(x_place + ((extent.column_tiles + tile) * 4 + step) * x_step)
                    total = tl.dot(w, tl.trans(x), total, input_precision=PRECISION)
    return total


@triton.jit
def small_batch_kernel(
    layer,  # PackedRows
    biases,  # as in Stack
    x_ptr,  # float [column tiles + slot tiles, 4 steps, padded tokens, 32] (prepare_floats.py)
    parts,  # Parts
    outputs,  # as in Stack
    tokens,
    padded,
    bounds,  # as in Stack
    rows,
    row_tiles,
    extent,  # Extent
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STACK: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE_LANES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_program = tl.program_id(0)
    token_program = tl.program_id(1)
    part = tl.program_id(2)
    token = token_program * TOKENS + tl.arange(0, TOKENS)
    total = small_batch_sums(
        layer,
        x_ptr,
        token,
        padded,
        row_tiles,
        extent,
        row_program,
        part,
        KIND,
        TILES,
        TOKENS,
        SPLIT,
        WIDE_LANES,
        PRECISION,
    )
    finish(
        total,
        operand_row(row_program * (TILES * 32), TILES),
        token,
        row_program,
        token_program,
        part,
        parts,
        layer.row_exponent,
        Stack(biases, outputs, bounds, rows),
        tokens,
        KIND,
        HAS_BIAS,
        STACK,
        SPLIT,
    )


def multiply_small_batch(product: Product, launch: Launch) -> None:
    """Write the outputs of any number of tokens."""
    tokens, geometry, device, warps = product.tokens, product.geometry, product.device, launch.batch_warps
    fp32 = product.x.dtype == torch.float32
    most = 16 if fp32 else launch.batch_tokens  # fp32 operands are split in three and take three times the registers
    places = min(most, max(16, triton.next_power_of_2(tokens)))
    padded = ceil_div(tokens, places) * places
    row_programs, token_programs = ceil_div(geometry.row_tiles, warps), padded // places
    split = product.split(row_programs * token_programs, launch.batch_programs)
    parts = product.parts(row_programs * token_programs, split, places * warps * 32)
    wide_lanes = not (device.warpgroup and warps % 4 == 0 and not fp32)
    prepared = prepare_floats(product, parts.counter, padded, wide_lanes)
    small_batch_kernel[(row_programs, token_programs, split)](
        **product.arguments(),
        x_ptr=prepared,
        parts=parts,
        padded=padded,
        row_tiles=geometry.row_tiles,
        TILES=warps,
        TOKENS=places,
        SPLIT=split,
        WIDE_LANES=wide_lanes,
        PRECISION="tf32x3" if fp32 and device.asm else "ieee",
        num_warps=warps,
        num_stages=launch.batch_stages,
    )
