"""Packed planes to a dense weight: what a prefill does once before an ordinary matrix product."""

import torch
import triton
import triton.language as tl


@triton.jit
def dequantize_kernel(
    word_ptr,  # int32 [base, rows, words]: base signs
    byte_ptr,  # uint8 [residual, rows, bytes]: signs of the salient columns
    slot_ptr,  # int32 [columns]: position among the salient columns, -1 where not salient
    row_scale_ptr,  # fp32 [base + residual, blocks, rows]
    column_scale_ptr,  # fp32 [columns]
    out_ptr,  # float [rows, columns]
    rows,
    columns,
    words,
    residual_bytes,
    blocks,
    BASE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside_column = column < columns
    inside = (row < rows)[:, None] & inside_column[None, :]
    row64 = row.to(tl.int64)
    block = (column // BLOCK_SIZE).to(tl.int64)
    value = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    for p in tl.static_range(BASE):
        word = tl.load(word_ptr + (row64[:, None] + p * rows) * words + (column // 32)[None, :], mask=inside, other=0)
        scale = tl.load(row_scale_ptr + (block[None, :] + p * blocks) * rows + row64[:, None], mask=inside, other=0.0)
        value += tl.where(((word >> (column % 32)[None, :]) & 1) != 0, scale, -scale)
    if RESIDUAL > 0:
        slot = tl.load(slot_ptr + column, mask=inside_column, other=-1)
        salient = inside & (slot >= 0)[None, :]
        for r in tl.static_range(RESIDUAL):
            position = (row64[:, None] + r * rows) * residual_bytes + (slot // 8)[None, :]
            byte = tl.load(byte_ptr + position, mask=salient, other=0).to(tl.int32)
            place = (block[None, :] + (BASE + r) * blocks) * rows + row64[:, None]
            scale = tl.load(row_scale_ptr + place, mask=salient, other=0.0)
            value += tl.where(((byte >> (slot % 8)[None, :]) & 1) != 0, scale, -scale)
    column_scale = tl.load(column_scale_ptr + column, mask=inside_column, other=0.0)
    value = value * column_scale[None, :]
    tl.store(out_ptr + row64[:, None] * columns + column[None, :], value.to(out_ptr.dtype.element_ty), mask=inside)


def dequantize(
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    block_size: int,
    residual_sign: torch.Tensor | None = None,
    salient_columns: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The dense weight [rows, columns] that packed planes stand for.

    Args:
        weight: packed base signs, int32 [base, rows, words].
        row_scale: a, fp32 [base + residual, blocks, rows], decoded.
        column_scale: c, fp32 [columns], decoded.
        block_size: columns per block.
        residual_sign: packed residual signs, uint8 [residual, rows, bytes]; None without residual planes.
        salient_columns: the columns they belong to, int64 [salient], ascending.
        out: where to write; [rows, columns], contiguous. A new tensor of ``dtype`` when None.
        dtype: of the new tensor.

    Raises:
        ValueError: shapes that do not belong together.
    """
    base, rows, words = weight.shape
    columns = column_scale.numel()
    blocks = -(-columns // block_size)
    residual = 0 if residual_sign is None else residual_sign.shape[0]
    if words != -(-columns // 32) or tuple(row_scale.shape) != (base + residual, blocks, rows):
        raise ValueError(
            f"weight {tuple(weight.shape)}, row_scale {tuple(row_scale.shape)} and {columns} column scales do not "
            f"belong to one layer with blocks of {block_size}."
        )
    if out is None:
        out = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    elif tuple(out.shape) != (rows, columns) or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)}; it must be contiguous and {(rows, columns)}.")
    slot = torch.full((columns,), -1, dtype=torch.int32, device=weight.device)
    if residual:
        slot[salient_columns] = torch.arange(salient_columns.numel(), dtype=torch.int32, device=weight.device)
    tile_rows, tile_columns = 32, 128
    dequantize_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_columns))](
        weight.contiguous(),
        residual_sign.contiguous() if residual else weight,
        slot,
        row_scale.contiguous(),
        column_scale.contiguous(),
        out,
        rows,
        columns,
        words,
        residual_sign.shape[2] if residual else 0,
        blocks,
        BASE=base,
        RESIDUAL=residual,
        BLOCK_SIZE=block_size,
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tile_columns,
    )
    return out
