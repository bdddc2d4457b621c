"""Many pairs of a row and an expert: small_batch.py's way, each tile of pairs with its expert's weight."""

import triton
import triton.language as tl
from torch import Tensor

from .arguments import Stack
from .expert_product import ExpertProduct
from .expert_tiles import (
    Routing,
    columns_of_expert,
    finish_expert,
    most_tiles,
    pairs_of,
    route,
    rows_of,
    rows_of_expert,
    tile_of,
)
from .finish import write_zeros
from .geometry import ceil_div
from .operand import operand_row
from .prepare_floats import prepare_float_tile
from .scaled import zero_counters, zeroing
from .small_batch import small_batch_sums
from .tuning import Launch

EACH = 16  # pairs of one program that prepares them


@triton.jit
def prepare_expert_floats_kernel(
    inputs,  # Activations
    out_ptr,  # float [column tiles + slot tiles, 4 steps, pairs, 32], by place in the order
    routing,  # Routing
    counter_ptr,  # int32 [counters], zeroed
    counters,
    extent,  # Extent
    COUNTERS_EACH: tl.constexpr,
    TOKENS: tl.constexpr,  # pairs of a tile
    EACH: tl.constexpr,  # pairs of a program
    WIDE_LANES: tl.constexpr,
    CODED: tl.constexpr,
):
    """One program for some of the pairs of a tile, and a tile of columns, or then of slots."""
    program = tl.program_id(0)
    zero_counters(counter_ptr, program, counters, COUNTERS_EACH)
    column_programs = extent.column_tiles + extent.slot_tiles
    run = program // column_programs
    RUNS: tl.constexpr = TOKENS // EACH
    expert, first, count = tile_of(routing, run // RUNS, True)
    place = run % RUNS * EACH + tl.arange(0, EACH)
    if (expert < 0) | (run % RUNS * EACH >= count):
        return
    pair = pairs_of(routing, first, place, count, inputs.tokens, True)
    prepare_float_tile(
        columns_of_expert(inputs, expert, extent),
        out_ptr,
        rows_of(routing, pair, inputs.tokens),
        first + place,
        place < count,
        inputs.tokens,
        program % column_programs,
        extent.column_tiles,
        WIDE_LANES,
        CODED,
    )


@triton.jit
def expert_batch_kernel(
    layer,  # PackedRows
    biases,  # as in Stack
    x_ptr,  # float [column tiles + slot tiles, 4 steps, pairs, 32], by place in the order
    parts,  # Parts
    routing,  # Routing
    outputs,  # as in Stack
    tokens,
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
    program = tl.program_id(0)
    part = tl.program_id(1)
    row_programs = (row_tiles + (TILES - 1)) // TILES
    row_program = program % row_programs
    row = operand_row(row_program * (TILES * 32), TILES)
    expert, first, count = tile_of(routing, program // row_programs, True)
    place = tl.arange(0, TOKENS)
    if expert < 0:
        pair = pairs_of(routing, first, place, count, tokens, True)
        write_zeros(outputs[0], row, pair, rows, tokens, part == 0)
        return
    total = small_batch_sums(
        rows_of_expert(layer, expert, row_tiles, extent, KIND),
        x_ptr,
        first + tl.minimum(place, count - 1),  # sums that are left out have the last pair's
        tokens,
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
    finish_expert(
        total,
        row,
        pairs_of(routing, first, place, count, tokens, True),
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


def multiply_expert_batch(product: ExpertProduct, launch: Launch, size: int) -> None:
    """Write the outputs of tiles of at most ``size`` pairs, a power of two from 16."""
    geometry, device, warps = product.geometry, product.device, launch.batch_warps
    fp32 = product.x.element_size() == 4
    routed = route(product.ids, product.experts, product.repeats, size)
    tiles = most_tiles(product.tokens, product.experts, size)
    programs = ceil_div(geometry.row_tiles, warps) * tiles
    split = product.split(programs, launch.batch_programs)
    parts = product.parts(programs, split, size * warps * 32)
    wide_lanes = not (device.warpgroup and warps % 4 == 0 and not fp32)
    prepared = _prepare(product, routed, parts.counter, (tiles, size), wide_lanes)
    expert_batch_kernel[(programs, split)](
        **product.arguments(),
        x_ptr=prepared,
        parts=parts,
        routing=routed,
        row_tiles=geometry.row_tiles,
        TILES=warps,
        TOKENS=size,
        SPLIT=split,
        WIDE_LANES=wide_lanes,
        PRECISION="tf32x3" if fp32 and device.asm else "ieee",
        num_warps=warps,
        num_stages=launch.batch_stages,
    )


def _prepare(
    product: ExpertProduct, routed: Routing, counter: Tensor, extent: tuple[int, int], wide_lanes: bool
) -> Tensor:
    """The activations of all pairs in the order of their experts, in x's dtype; zeroes ``counter``.

    Args:
        extent: tiles, and pairs of each.
    """
    geometry, (tiles, size) = product.geometry, extent
    column_programs = geometry.column_tiles + geometry.slot_tiles
    prepared = product.space(column_programs, 4, product.tokens, 32, dtype=product.x.dtype)
    programs = tiles * (size // EACH) * column_programs
    prepare_expert_floats_kernel[(programs,)](
        product.inputs,
        prepared,
        routed,
        **zeroing(counter, programs),
        extent=product.arguments()["extent"],
        TOKENS=size,
        EACH=EACH,
        WIDE_LANES=wide_lanes,
        CODED=bool(geometry.code),
    )
    return prepared
