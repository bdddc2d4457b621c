"""A few pairs of a row and an expert: decode.py's way, each tile of pairs with its expert's weight."""

import torch
import triton
import triton.language as tl

from .arguments import LimbOperand, Stack
from .decode import BYTE_TABLES, decode_sums
from .expert_product import ExpertProduct
from .expert_tiles import (
    columns_of_expert,
    finish_expert,
    limbs_of_tile,
    most_tiles,
    pairs_of,
    route,
    rows_of,
    rows_of_expert,
    slots_of_tile,
    tile_of,
)
from .finish import write_zeros
from .prepare import prepare_tile
from .scaled import zero_counters, zeroing
from .tuning import Launch


@triton.jit
def prepare_expert_limbs_kernel(
    inputs,  # Activations
    columns,  # LimbOperand of every tile of pairs
    slots,  # LimbOperand of every tile of pairs
    routing,  # Routing
    counter_ptr,  # int32 [counters], zeroed
    counters,
    extent,  # Extent
    COUNTERS_EACH: tl.constexpr,
    TILED: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOT_TOKENS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr,  # 0 unless coded
):
    """One program for each tile of pairs and tile of columns, or then of slots."""
    program = tl.program_id(0)
    zero_counters(counter_ptr, program, counters, COUNTERS_EACH)
    column_programs = extent.column_tiles + extent.slot_tiles
    tile = program // column_programs
    expert, first, count = tile_of(routing, tile, TILED)
    if expert < 0:
        return
    PLACES: tl.constexpr = TOKENS if CLASSES == 0 else TOKENS // CLASSES
    GROUPS: tl.constexpr = 128 // SCALE_COLUMNS if CLASSES == 0 else 2
    UNITS: tl.constexpr = 1 if CLASSES == 0 else 2
    pair = pairs_of(routing, first, tl.arange(0, PLACES), count, inputs.tokens, TILED)
    slot_pair = pairs_of(routing, first, tl.arange(0, SLOT_TOKENS), count, inputs.tokens, TILED)
    prepare_tile(
        columns_of_expert(inputs, expert, extent),
        limbs_of_tile(columns, tile, extent.column_tiles, TOKENS, GROUPS, UNITS),
        slots_of_tile(slots, tile, extent.slot_tiles, SLOT_TOKENS),
        rows_of(routing, pair, inputs.tokens),
        rows_of(routing, slot_pair, inputs.tokens),
        program % column_programs,
        extent.column_tiles,
        TOKENS,
        SLOT_TOKENS,
        SCALE_COLUMNS,
        CLASSES,
    )


@triton.jit
def expert_decode_kernel(
    layer,  # PackedRows
    biases,  # as in Stack
    columns,  # LimbOperand of every tile of pairs
    slots,  # LimbOperand of every tile of pairs
    parts,  # Parts
    routing,  # Routing
    outputs,  # as in Stack
    tokens,
    bounds,  # as in Stack
    rows,
    row_tiles,
    extent,  # Extent
    tables,  # ByteTables
    KIND: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STACK: tl.constexpr,
    TILED: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOT_TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,
    CLASSES: tl.constexpr,
):
    program = tl.program_id(0)
    part = tl.program_id(1)
    row_programs = row_tiles // TILES
    row_program = program % row_programs
    tile = program // row_programs
    row = row_program * (TILES * 32) + tl.arange(0, TILES * 32)
    expert, first, count = tile_of(routing, tile, TILED)
    place = tl.arange(0, SLOT_TOKENS)
    if expert < 0:
        pair = pairs_of(routing, first, place, count, tokens, TILED)
        write_zeros(outputs[0], row, pair, rows, tokens, part == 0)
        return
    CODED: tl.constexpr = len(KIND.code) > 0
    total = decode_sums(
        rows_of_expert(layer, expert, row_tiles, extent, KIND),
        limbs_of_tile(
            columns,
            tile,
            extent.column_tiles,
            TOKENS,
            2 if CODED else 128 // SCALE_COLUMNS,
            2 if CODED else 1,
        ),
        slots_of_tile(slots, tile, extent.slot_tiles, SLOT_TOKENS),
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
    finish_expert(
        total,
        row,
        pairs_of(routing, first, place, count, tokens, TILED),
        expert,
        program,
        part,
        parts,
        layer,
        Stack(biases, outputs, bounds, rows),
        tokens,
        row_tiles,
        KIND,
        HAS_BIAS,
        STACK,
        SPLIT,
    )


def multiply_expert_decode(product: ExpertProduct, launch: Launch, size: int) -> None:
    """Write the outputs, in bf16 or fp16, of tiles of at most ``size`` pairs: 1, 4 or 8."""
    geometry = product.geometry
    routed = route(product.ids, product.experts, product.repeats, size)
    tiles = most_tiles(product.tokens, product.experts, size)
    places = 8 if size == 8 else 4  # columns of the matrix operand: two for a pair
    slot_places = 2 if size == 1 else places
    row_tiles = launch.decode_tiles if geometry.row_tiles % launch.decode_tiles == 0 and places == 4 else 1
    programs = geometry.row_tiles // row_tiles * tiles
    split = product.split(programs, launch.decode_programs)
    parts = product.parts(programs, split, slot_places * row_tiles * 32)
    classes = places // size if geometry.code else 1  # places that are free take a part of the columns (coded.py)
    columns, slots = _operands(product, tiles, places, slot_places)
    arguments = product.arguments()
    common = {
        "columns": columns,
        "slots": slots,
        "routing": routed,
        "extent": arguments["extent"],
        "TILED": size > 1,
        "TOKENS": places,
        "SLOT_TOKENS": slot_places,
        "SCALE_COLUMNS": geometry.scale_columns,
    }
    prepare_programs = tiles * (geometry.column_tiles + geometry.slot_tiles)
    prepare_expert_limbs_kernel[(prepare_programs,)](
        product.inputs,
        **zeroing(parts.counter, prepare_programs),
        CLASSES=classes if geometry.code else 0,
        **common,
    )
    expert_decode_kernel[(programs, split)](
        **{**arguments, **common},
        parts=parts,
        row_tiles=geometry.row_tiles,
        tables=BYTE_TABLES,
        TILES=row_tiles,
        SPLIT=split,
        UNROLL=launch.decode_unroll,
        CLASSES=classes,
        num_warps=1,
        num_stages=1,
    )


def _operands(product: ExpertProduct, tiles: int, places: int, slot_places: int) -> tuple[LimbOperand, LimbOperand]:
    """Room for the operands of every tile of pairs: of the columns and of the slots."""
    geometry, space = product.geometry, product.space
    groups, units = (2, 2) if geometry.code else (128 // geometry.scale_columns, 1)
    per_columns, per_slots = tiles * geometry.column_tiles, tiles * geometry.slot_tiles
    columns = LimbOperand(
        space(per_columns, 256 * places, dtype=torch.int8),
        space(per_columns, groups * places, dtype=torch.int32),
        space(per_columns, units * places, dtype=torch.float32),
    )
    slots = LimbOperand(
        space(per_slots, 512 * slot_places, dtype=torch.int8),
        space(per_slots, 8 * slot_places, dtype=torch.int32),
        space(per_slots, 8 * slot_places, dtype=torch.float32),
    )
    return columns, slots
