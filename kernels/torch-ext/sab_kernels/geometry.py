"""The numbers a kernel needs to know of a layer, and what follows from them."""

from dataclasses import dataclass
from functools import cached_property

TILE_ROWS = 32  # rows of one tile of packed signs: 8 lane groups by 4 words
TILE_COLUMNS = 128  # columns of one tile: 4 lanes by 32 bits
SLOT = 16  # salient columns that share a row scale in one step of the matrix unit
TILE_SLOTS = TILE_COLUMNS // SLOT


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


@dataclass(frozen=True)
class Geometry:
    """Shape of a packed layer (docs/format.md). What follows from it is kept, because every launch asks for it.

    Args:
        rows: out_features, at least 1.
        columns: in_features, at least 1.
        block_size: columns that share a row scale, a multiple of 32.
        base_planes: sign planes on every column, at least 1.
        residual_planes: sign planes on the salient columns.
        salient: number of salient columns in a full block; 0 without residual planes.
        salient_last: the same in the last block, which may be narrower.
        fp8: whether row scales are e4m3 bits with a power of two per row, or fp16 bits.
        code: generators of the planes that are derived of the first base plane, ``P_q[j] = xor of u[j − k] over the
            bits k of code[q]``, the q-th with 2^−q of its row scale; empty where it is a plane like others.
    """

    rows: int
    columns: int
    block_size: int
    base_planes: int
    residual_planes: int
    salient: int
    salient_last: int
    fp8: bool
    code: tuple[int, ...] = ()

    @property
    def planes(self) -> int:
        """Base and residual planes together."""
        return self.base_planes + self.residual_planes

    @cached_property
    def blocks(self) -> int:
        return ceil_div(self.columns, self.block_size)

    @cached_property
    def row_tiles(self) -> int:
        return ceil_div(self.rows, TILE_ROWS)

    @cached_property
    def column_tiles(self) -> int:
        return ceil_div(self.columns, TILE_COLUMNS)

    @cached_property
    def salient_counts(self) -> tuple[int, ...]:
        """Salient columns of every block."""
        if not self.residual_planes:
            return (0,) * self.blocks
        return (*((self.salient,) * (self.blocks - 1)), self.salient_last)

    @cached_property
    def slots_per_block(self) -> int:
        """Groups of 16 that hold a block's salient columns; the same for all blocks, padded."""
        return ceil_div(max(self.salient_counts), SLOT)

    @cached_property
    def slot_tiles(self) -> int:
        """Tiles of 128 columns that hold all slots."""
        return ceil_div(self.blocks * self.slots_per_block, TILE_SLOTS)

    @cached_property
    def scale_columns(self) -> int:
        """Columns after which the row scale may change, within a tile: 32, 64 or 128."""
        return next(width for width in (128, 64, 32) if self.block_size % width == 0)
