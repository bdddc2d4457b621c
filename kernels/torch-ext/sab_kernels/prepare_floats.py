"""Activations as floats in the order of the packed signs: what a product of more tokens does first."""

import triton
import triton.language as tl
from torch import Tensor

from .coded import coded_column
from .operand import operand_column
from .product import Product
from .scaled import dense_rows, load_scaled, zero_counters, zeroing


@triton.jit
def prepare_float_tile(
    inputs,  # Activations
    out_ptr,  # float [column tiles + slot tiles, 4 steps, padded tokens, 32]
    row,  # int [tokens]: of x, or −1
    token,  # int [tokens]: where it is written
    there,  # bool [tokens]: whether it is
    padded,
    tile,
    column_tiles,
    WIDE_LANES: tl.constexpr,
    CODED: tl.constexpr,
):
    """Write what small_batch.py reads of one tile of the columns, or then of the slots."""
    place = tl.arange(0, 128)
    step = place // 32
    kappa = place % 32
    within = step * 32 + operand_column(kappa, WIDE_LANES)
    if tile < column_tiles:
        column = tile * 128 + (coded_column(within) if CODED else within)
        column = tl.where(column < inputs.columns, column, -1)
    else:
        column = tl.load(inputs.residual_index + (tile - column_tiles) * 128 + within)
    x = load_scaled(inputs, column, row)
    at = out_ptr + ((tile * 4 + step).to(tl.int64)[None, :] * padded + token[:, None]) * 32 + kappa[None, :]
    tl.store(at, x.to(out_ptr.dtype.element_ty), mask=there[:, None])


@triton.jit
def prepare_floats_kernel(
    inputs,  # Activations
    out_ptr,  # float [column tiles + slot tiles, 4 steps, padded tokens, 32]
    counter_ptr,  # int32 [counters], zeroed
    counters,
    padded,
    column_tiles,
    COUNTERS_EACH: tl.constexpr,
    TOKENS: tl.constexpr,  # tokens of one program
    WIDE_LANES: tl.constexpr,
    CODED: tl.constexpr = False,
):
    """For small_batch.py. One program for each tile of columns, then of slots, and each group of tokens."""
    tile = tl.program_id(0)
    zero_counters(counter_ptr, tile * tl.num_programs(1) + tl.program_id(1), counters, COUNTERS_EACH)
    first = tl.program_id(1) * TOKENS
    token = first + tl.arange(0, TOKENS)
    row = dense_rows(inputs, first, TOKENS)
    prepare_float_tile(inputs, out_ptr, row, token, token < padded, padded, tile, column_tiles, WIDE_LANES, CODED)


def prepare_floats(product: Product, counter: Tensor, padded: int, wide_lanes: bool) -> Tensor:
    """The activations in x's dtype, [column tiles + slot tiles, 4 steps, ``padded`` tokens, 32]; zeroes ``counter``."""
    tiles = product.geometry.column_tiles + product.geometry.slot_tiles
    prepared = product.space(tiles, 4, padded, 32, dtype=product.x.dtype)
    grid = (tiles, padded // 16)
    prepare_floats_kernel[grid](
        product.inputs,
        prepared,
        **zeroing(counter, grid[0] * grid[1]),
        padded=padded,
        column_tiles=product.geometry.column_tiles,
        TOKENS=16,
        WIDE_LANES=wide_lanes,
        CODED=bool(product.geometry.code),
    )
    return prepared
