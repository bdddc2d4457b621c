"""Which pairs of a row and an expert are computed together, decided on the device: tiles of pairs of one expert.

Pairs are sorted by their experts, and each expert's are cut into tiles. How many there are depends on values, so a
launch has as many programs as there might be; those past the last tile end at once. Nobody waits for the device.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Activations, LimbOperand, PackedRows, Stack
from .finish import finish
from .geometry import ceil_div

TABLE_ENTRIES = 8192  # comparisons of one program of the table's kernel


class Routing(NamedTuple):
    """Pairs and their experts. In the place of what a kernel does not read stands any tensor."""

    ids: Any  # int [pairs]: experts, those that are there or not
    order: Any  # int [pairs]: pairs, sorted by expert; only where they are in tiles
    table: Any  # int32 [tiles, 4]: expert or −1, first place in the order, number of pairs, nothing; the same
    experts: Any
    repeats: Any  # pairs that have the same row, one after the other


@triton.jit
def _places_below(sorted_ptr, bound, pairs, steps):
    """How many of the sorted ids are less than each bound, by halving ``steps`` times."""
    low = bound * 0
    high = low + pairs
    for _ in range(steps):
        middle = (low + high) // 2
        active = low < high
        right = active & (tl.load(sorted_ptr + middle, mask=active, other=0) < bound)
        high = tl.where(active & (right == 0), middle, high)
        low = tl.where(right, middle + 1, low)
    return low


@triton.jit
def tile_table_kernel(
    sorted_ptr,  # int [pairs], ascending
    table_ptr,  # int32 [tiles, 4]
    pairs,
    experts,
    tiles,
    steps,
    PAIRS: tl.constexpr,  # of a tile, at most
    GROUPS: tl.constexpr,  # a power of two from experts + 2 on
    EACH: tl.constexpr,  # tiles of a program
):
    """Groups are the ids below zero, those of every expert, and those past the last one."""
    group = tl.arange(0, GROUPS)
    start = _places_below(sorted_ptr, group - 1, pairs, steps)
    start = tl.where(group == 0, 0, tl.where(group > experts + 1, pairs, start))
    stop = tl.where(group > experts, pairs, _places_below(sorted_ptr, group, pairs, steps))
    count = (stop - start + (PAIRS - 1)) // PAIRS
    tile_stop = tl.cumsum(count, 0)
    tile = tl.program_id(0) * EACH + tl.arange(0, EACH)
    of_group = tl.sum((tile_stop[None, :] <= tile[:, None]).to(tl.int32), axis=1)  # GROUPS past the last tile
    mine = group[None, :] == of_group[:, None]
    begins = start[None, :] + (tile[:, None] - (tile_stop - count)[None, :]) * PAIRS
    first = tl.sum(tl.where(mine, begins, 0), axis=1)
    size = tl.minimum(tl.sum(tl.where(mine, stop[None, :], 0), axis=1) - first, PAIRS)
    expert = tl.where((of_group > 0) & (of_group <= experts), of_group - 1, -1)
    entry = table_ptr + tile * 4
    tl.store(entry, expert, mask=tile < tiles)
    tl.store(entry + 1, first, mask=tile < tiles)
    tl.store(entry + 2, size, mask=tile < tiles)


@triton.jit
def tile_of(routing, tile, TILED: tl.constexpr):
    """Expert of a tile, −1 where there is none, first place in the order, and number of pairs: without a table a tile
    is a pair."""
    if TILED:
        entry = routing.table + tile * 4
        return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    else:
        id = tl.load(routing.ids + tile)
        return tl.where((id >= 0) & (id < routing.experts), id.to(tl.int32), -1), tile, tile * 0 + 1


@triton.jit
def pairs_of(routing, first, place, count, pairs, TILED: tl.constexpr):
    """The pairs at places of a tile; ``pairs`` where there is none."""
    if TILED:
        return tl.load(routing.order + first + place, mask=place < count, other=pairs).to(tl.int32)
    else:
        return tl.where(place < count, first + place, pairs)


@triton.jit
def rows_of(routing, pair, pairs):
    """The row of x that each pair has; −1 where there is no pair."""
    return tl.where(pair < pairs, pair // routing.repeats, -1)


@triton.jit
def rows_of_expert(layer, expert, row_tiles, extent, KIND: tl.constexpr):
    """One expert's `PackedRows` of the stacked ones."""
    e = expert.to(tl.int64)
    planes: tl.constexpr = KIND.base_planes + KIND.residual_planes
    return PackedRows(
        layer.weight + e * (row_tiles * extent.column_tiles * (KIND.base_planes * 128)),
        layer.residual_sign + e * (row_tiles * extent.slot_tiles * (KIND.residual_planes * 128)),
        layer.row_scale + e * (row_tiles * extent.blocks * (planes * 32)),
        layer.row_exponent + e * (row_tiles * 32),
    )


@triton.jit
def columns_of_expert(inputs, expert, extent):
    """`Activations` with one expert's column scales and salient columns."""
    e = expert.to(tl.int64)
    return Activations(
        inputs.x,
        inputs.col_scale + e * (extent.column_tiles * 128),
        inputs.residual_index + e * ((extent.slot_tiles + extent.column_tiles) * 128),
        inputs.tokens,
        inputs.columns,
        inputs.stride,
    )


@triton.jit
def limbs_of_tile(columns, tile, column_tiles, TOKENS: tl.constexpr, GROUPS: tl.constexpr, UNITS: tl.constexpr):
    """One tile of pairs' operand of the columns: GROUPS starts and UNITS units of a tile of columns."""
    t = tile.to(tl.int64)
    return LimbOperand(
        columns.limb + t * (column_tiles * (256 * TOKENS)),
        columns.start + t * (column_tiles * (GROUPS * TOKENS)),
        columns.unit + t * (column_tiles * (UNITS * TOKENS)),
    )


@triton.jit
def slots_of_tile(slots, tile, slot_tiles, TOKENS: tl.constexpr):
    """One tile of pairs' operand of the slots."""
    t = tile.to(tl.int64)
    return LimbOperand(
        slots.limb + t * (slot_tiles * (512 * TOKENS)),
        slots.start + t * (slot_tiles * (8 * TOKENS)),
        slots.unit + t * (slot_tiles * (8 * TOKENS)),
    )


def most_tiles(pairs: int, experts: int, size: int) -> int:
    """The most tiles of ``size`` pairs that there may be, whatever their experts: those of no expert are two groups."""
    return min(pairs, (pairs + (experts + 2) * (size - 1)) // size)


def route(ids: Tensor, experts: int, repeats: int, size: int) -> Routing:
    """The tiles of at most ``size`` pairs; without a table where that is 1, because then every pair is one.

    Args:
        ids: int [pairs], contiguous: the expert of every pair; of none where it is not in 0 … experts − 1.
    """
    if size == 1:
        return Routing(ids, ids, ids, experts, repeats)
    pairs, tiles = ids.numel(), most_tiles(ids.numel(), experts, size)
    in_order, order = torch.sort(ids, dim=0, stable=True)
    table = torch.empty(tiles, 4, dtype=torch.int32, device=ids.device)
    groups = triton.next_power_of_2(experts + 2)
    each = max(1, min(TABLE_ENTRIES // groups, triton.next_power_of_2(tiles)))
    tile_table_kernel[(ceil_div(tiles, each),)](
        in_order, table, pairs, experts, tiles, pairs.bit_length(), PAIRS=size, GROUPS=groups, EACH=each
    )
    return Routing(ids, order, table, experts, repeats)


@triton.jit
def finish_expert(
    total,
    row,
    pair,
    expert,
    program,
    part,
    parts,
    layer,  # PackedRows of all experts
    stack,  # Stack, biases of all experts
    tokens,
    row_tiles,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STACK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """`finish` for a tile of pairs of one expert, with the row exponents and the bias of that one."""
    finish(
        total,
        row,
        pair,
        program,
        0,
        part,
        parts,
        layer.row_exponent + expert.to(tl.int64) * (row_tiles * 32),
        Stack((stack.biases[0] + expert.to(tl.int64) * stack.rows,), stack.outputs, stack.bounds, stack.rows),
        tokens,
        KIND,
        HAS_BIAS,
        STACK,
        SPLIT,
    )
