"""A few tokens: the packed signs go through the matrix unit as 8-bit integers.

The activations of a block are integers of 15 bits under one unit, split into two 8-bit limbs that are two columns of
the operand, so the signed sum of a block is exact; the error is that of rounding x to 15 bits, which is less than what
bf16 loses. Weights are loaded once, in the order in which lanes hold them, and unpacked four by one instruction.
"""

import triton
import triton.language as tl

from .arguments import ByteTables, Stack
from .coded import load_coded_byte_operands
from .finish import finish
from .operand import RowScales, load_byte_operands, load_limb_operand, load_row_scale
from .prepare import prepare_limbs
from .product import Product
from .tuning import Launch

BYTE_TABLES = ByteTables(even=-16711936, pair=-65536, ones=0x01010101)  # 0xFF00FF00, 0xFFFF0000, signed


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
def _coded_sums(accumulator, start, unit, PAIRS: tl.constexpr, CLASSES: tl.constexpr):
    """The same of a coded plane: half the sum of ``(2 P₁ + P₂) q``, of runs of steps whose operands are larger each by
    some power of four (coded.py)."""
    if CLASSES == 1:
        return _signed_sums(accumulator, start, unit, PAIRS)
    high, low = tl.split(accumulator.reshape(accumulator.shape[0], PAIRS, 2))
    shift = tl.arange(0, PAIRS) * CLASSES // PAIRS * (8 // CLASSES)
    value = (((high * 128 + low) >> shift[None, :]) + start[None, :]).to(tl.float32, bitcast=True)
    return value * unit[None, :] + (unit * -12582912.0)[None, :]


@triton.jit
def decode_sums(
    layer,  # PackedRows
    columns,  # LimbOperand
    slots,  # LimbOperand, without residual planes not read
    extent,  # Extent
    tables,  # ByteTables
    row_program,
    part,
    KIND: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOT_TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,
    CLASSES: tl.constexpr,  # runs of steps with sums of their own, of a coded layer (coded.py)
):
    """Sums over one of SPLIT parts of the columns, fp32 [32 · TILES rows, SLOT_TOKENS]: without the power of two of a
    row, and without its bias."""
    BASE: tl.constexpr = KIND.base_planes
    RESIDUAL: tl.constexpr = KIND.residual_planes
    CODED: tl.constexpr = len(KIND.code) > 0
    ROWS: tl.constexpr = TILES * 32
    GROUPS: tl.constexpr = 128 // SCALE_COLUMNS
    LIMBS: tl.constexpr = 2 * TOKENS
    row_tile = (row_program * TILES).to(tl.int64)
    weight_stride = extent.column_tiles * (BASE * 128)
    weight_ptr = layer.weight + row_tile * weight_stride
    scale_stride = extent.blocks * ((BASE + RESIDUAL) * 32)
    row_scale_ptr = layer.row_scale + row_tile * scale_stride
    token = tl.arange(0, TOKENS)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    first, stop = part * extent.column_tiles // SPLIT, (part + 1) * extent.column_tiles // SPLIT
    for tile in tl.range(first, stop, loop_unroll_factor=UNROLL):
        limb_ptr = columns.limb + tile * (128 * LIMBS)
        x0 = load_limb_operand(limb_ptr, LIMBS)
        x1 = load_limb_operand(limb_ptr + 32 * LIMBS, LIMBS)
        x2 = load_limb_operand(limb_ptr + 64 * LIMBS, LIMBS)
        x3 = load_limb_operand(limb_ptr + 96 * LIMBS, LIMBS)
        if not CODED:
            unit = tl.load(columns.unit + tile * TOKENS + token)
            start_ptr = columns.start + tile * (GROUPS * TOKENS) + token
        for plane in tl.static_range(BASE):
            tile_ptr = weight_ptr + (tile * BASE + plane) * 128
            if CODED:
                place = tile * (2 * TOKENS) + (TOKENS if plane > 0 else 0) + token
                unit = tl.load(columns.unit + place)
                start_ptr = columns.start + place
            if CODED and plane == 0:
                w0, w1, w2, w3 = load_coded_byte_operands(tile_ptr, weight_stride, tile, TILES, CLASSES, KIND)
            else:
                w0, w1, w2, w3 = load_byte_operands(tile_ptr, weight_stride, tables, TILES, KIND)
            acc = tl.zeros((ROWS, LIMBS), tl.int32)
            for step in tl.static_range(4):
                w = w0 if step == 0 else (w1 if step == 1 else (w2 if step == 2 else w3))
                x = x0 if step == 0 else (x1 if step == 1 else (x2 if step == 2 else x3))
                acc = tl.dot(w, x, acc, out_dtype=tl.int32)
                if (step + 1) * GROUPS % 4 == 0:  # the row scale may change here
                    scales = RowScales(row_scale_ptr + plane * 32, scale_stride, extent.blocks)
                    scale = load_row_scale(scales, tile * 128 + step * 32, KIND.block_size, LIMBS, TILES, 4, KIND)
                    scale = tl.broadcast_to(scale[:, None, :], (ROWS, TOKENS // 4, 4)).reshape(ROWS, TOKENS)
                    start = tl.load(start_ptr + ((step + 1) * GROUPS // 4 - 1) * TOKENS)
                    if CODED and plane == 0:
                        total += _coded_sums(acc, start, unit, TOKENS, CLASSES) * scale
                    else:
                        total += _signed_sums(acc, start, unit, TOKENS) * scale
                    if step < 3:
                        acc = tl.zeros((ROWS, LIMBS), tl.int32)
    if CLASSES == TOKENS:  # all are one token's
        total = tl.broadcast_to(tl.sum(total, axis=1)[:, None], (ROWS, SLOT_TOKENS))
    else:
        total = tl.sum(total.reshape(ROWS, TOKENS // SLOT_TOKENS, SLOT_TOKENS), axis=1)  # tokens past SLOT_TOKENS are 0
    if RESIDUAL > 0 and KIND.slots_per_block > 0:
        PAIRS: tl.constexpr = 2 * SLOT_TOKENS
        residual_stride = extent.slot_tiles * (RESIDUAL * 128)
        residual_ptr = layer.residual_sign + row_tile * residual_stride
        rest = tl.zeros((ROWS, PAIRS), tl.float32)
        for tile in tl.range(part * extent.slot_tiles // SPLIT, (part + 1) * extent.slot_tiles // SPLIT):
            for plane in tl.static_range(RESIDUAL):
                tile_ptr = residual_ptr + (tile * RESIDUAL + plane) * 128
                w0, w1, w2, w3 = load_byte_operands(tile_ptr, residual_stride, tables, TILES, KIND)
                for step in tl.static_range(4):
                    entry = tile * 4 + step
                    x = load_limb_operand(slots.limb + entry * (64 * PAIRS), 2 * PAIRS)
                    w = w0 if step == 0 else (w1 if step == 1 else (w2 if step == 2 else w3))
                    acc = tl.dot(w, x, out_dtype=tl.int32)
                    start = tl.load(slots.start + entry * PAIRS + tl.arange(0, PAIRS))
                    unit = tl.load(slots.unit + entry * PAIRS + tl.arange(0, PAIRS))
                    scales = RowScales(row_scale_ptr + (BASE + plane) * 32, scale_stride, extent.blocks)
                    scale = load_row_scale(scales, entry * 2, KIND.slots_per_block, SLOT_TOKENS, TILES, PAIRS, KIND)
                    rest += _signed_sums(acc, start, unit, PAIRS) * scale
        total += tl.sum(rest.reshape(ROWS, 2, SLOT_TOKENS), axis=1)
    return total


@triton.jit
def decode_kernel(
    layer,  # PackedRows
    biases,  # as in Stack
    columns,  # LimbOperand
    slots,  # LimbOperand, without residual planes not read
    parts,  # Parts
    outputs,  # as in Stack
    tokens,
    bounds,  # as in Stack
    rows,
    extent,  # Extent
    tables,  # ByteTables
    KIND: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STACK: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOT_TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,
    CLASSES: tl.constexpr = 1,
):
    row_program = tl.program_id(0)
    part = tl.program_id(1)
    ROWS: tl.constexpr = TILES * 32
    total = decode_sums(
        layer,
        columns,
        slots,
        extent,
        tables,
        row_program,
        part,
        KIND,
        SCALE_COLUMNS,
        TILES,
        TOKENS,
        SLOT_TOKENS,
        SPLIT,
        UNROLL,
        CLASSES,
    )
    finish(
        total,
        row_program * ROWS + tl.arange(0, ROWS),
        tl.arange(0, SLOT_TOKENS),
        row_program,
        0,
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


def multiply_decode(product: Product, launch: Launch) -> None:
    """Write the outputs of at most 8 tokens, in bf16 or fp16."""
    tokens, geometry = product.tokens, product.geometry
    places = 4 if tokens <= 4 else 8  # columns of the matrix operand: two for a token
    slot_places = 2 if tokens <= 2 else places
    # with 8 tokens two row tiles do not fit in registers on every device
    tiles = launch.decode_tiles if geometry.row_tiles % launch.decode_tiles == 0 and places == 4 else 1
    programs = geometry.row_tiles // tiles
    split = product.split(programs, launch.decode_programs)
    parts = product.parts(programs, split, slot_places * tiles * 32)
    # a coded layer's free places take a part of the columns
    classes = max(1, places // triton.next_power_of_2(tokens)) if geometry.code else 1
    columns, slots = prepare_limbs(product, parts.counter, places, slot_places, classes)
    decode_kernel[(programs, split)](
        **product.arguments(),
        columns=columns,
        slots=slots,
        parts=parts,
        tables=BYTE_TABLES,
        SCALE_COLUMNS=geometry.scale_columns,
        TILES=tiles,
        TOKENS=places,
        SLOT_TOKENS=slot_places,
        SPLIT=split,
        UNROLL=launch.decode_unroll,
        CLASSES=classes,
        num_warps=1,
        num_stages=1,
    )
