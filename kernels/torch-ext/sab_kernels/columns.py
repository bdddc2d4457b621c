"""Loops over the columns of a block while signs are chosen: error feedback, and coordinate descent. Every column needs
those before it, every row only itself. Weights of one shape are gone through together, each with what is its own.

Sixteen columns are gone through in registers by one launch, and what they change in later columns follows by one
product, where torch needs a few launches for every column. Columns lie one after the other in memory, so that a thread
has all sixteen of its rows, and none waits for another.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import on_device
from .geometry import ceil_div

ROWS = 64  # of a program: two of each thread
TILE = 16  # columns of a launch: their signs are the bits of a word
WARPS = 1


class Levels(NamedTuple):
    """What a column's entries may become: ``c_j · Σ_p ±a_p``. Contiguous, with the weights of a stack first.

    Attributes:
        row_scale: a of the first plane, fp32 [..., rows].
        base: ``Σ_p ±a_p`` of the planes that every column has, fp32 [..., 2**base_planes, rows]; bit p of the index
            says that plane p is positive.
        all: the same of all planes, [..., 2**planes, rows].
        column_scale: c, fp32 [..., width].
        salient: which columns have all planes, bool [..., width].
    """

    row_scale: Tensor
    base: Tensor
    all: Tensor
    column_scale: Tensor
    salient: Tensor


@triton.jit
def _nearest(levels_ptr, rows, row, wanted, scale, COUNT: tl.constexpr):
    """Index of the level nearest to ``wanted``, the first of equals, and its value [rows]."""
    there = row < rows
    value = tl.load(levels_ptr + row, mask=there, other=0.0) * scale
    least = tl.abs(value - wanted)
    chosen = tl.zeros_like(row)
    for index in tl.static_range(1, COUNT):
        level = tl.load(levels_ptr + index * rows + row, mask=there, other=0.0) * scale
        distance = tl.abs(level - wanted)
        nearer = distance < least
        least = tl.where(nearer, distance, least)
        value = tl.where(nearer, level, value)
        chosen = tl.where(nearer, index, chosen)
    return chosen, value


@triton.jit
def _pick(own, levels_ptr, rows, row, wanted, scale, PLANES: tl.constexpr):
    """`_nearest`, where one plane needs no search: zero counts as positive."""
    if PLANES == 1:
        value = own * scale
        positive = wanted * value >= 0.0
        chosen = positive.to(tl.int32)
        value = tl.where(positive, value, -value)
    else:
        chosen, value = _nearest(levels_ptr, rows, row, wanted, scale, 2**PLANES)
    return chosen, value


@triton.jit
def _with_bits(words, code, bit, PLANES: tl.constexpr):
    """Words of every plane [rows], with the planes' bits of ``code`` set in the place ``bit``."""
    if PLANES == 1:
        return (words[0] | (code & 1) << bit,)
    elif PLANES == 2:
        return (words[0] | (code & 1) << bit, words[1] | (code >> 1 & 1) << bit)
    elif PLANES == 3:
        return (words[0] | (code & 1) << bit, words[1] | (code >> 1 & 1) << bit, words[2] | (code >> 2 & 1) << bit)
    else:
        return (
            words[0] | (code & 1) << bit,
            words[1] | (code >> 1 & 1) << bit,
            words[2] | (code >> 2 & 1) << bit,
            words[3] | (code >> 3 & 1) << bit,
        )


@triton.jit
def column_kernel(
    x_ptr,  # fp32 [weights, width, rows]: what is to be approximated; or the gradient
    value_ptr,  # fp32 [weights, width, rows], DESCENT only: Q as it is
    step_ptr,  # fp32 [weights, width, rows]: scaled errors; or, in a descent, by how much Q falls
    sign_ptrs,  # fp32 [weights, rows, width] of every plane
    levels,  # Levels
    coupling_ptr,  # fp32 [weights, width, width]: U, or H
    rows,
    width,
    start,
    end,
    sign_stride,  # between rows
    sign_next,  # between weights
    coupling_stride,
    coupling_next,
    BASE: tl.constexpr,
    PLANES: tl.constexpr,
    DESCENT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """ROWS rows of a weight, the columns from start to end in order.

    With x as it is when column j is reached, feedback takes the level nearest to ``x_j``, of which the scaled error is
    ``e = (x_j − q) / U_jj``, and then ``x −= e U_j``. A descent takes the one nearest to ``q_j + x_j / H_jj``, and then
    ``x += (q_j − q) H_j``. Of x only what is in registers is changed.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    weight = tl.program_id(1).to(tl.int64)
    there = row < rows
    place = tl.arange(0, TILE)
    column = start + place
    inside = (column < end)[:, None] & there[None, :]
    wide_rows = rows.to(tl.int64)
    x_ptr += weight * width * rows
    step_ptr += weight * width * rows
    coupling_ptr += weight * coupling_next
    base_ptr = levels.base + weight * 2**BASE * rows
    all_ptr = levels.all + weight * 2**PLANES * rows
    column_scale_ptr = levels.column_scale + weight * width
    salient_ptr = levels.salient + weight * width
    own = tl.load(levels.row_scale + weight * rows + row, mask=there, other=0.0)
    x = tl.load(x_ptr + column[:, None] * wide_rows + row[None, :], mask=inside, other=0.0)
    words = (tl.zeros((ROWS,), tl.int32),) * PLANES
    for j in range(start, end):
        scale = tl.load(column_scale_ptr + j)
        salient = tl.load(salient_ptr + j) != 0
        diagonal = tl.load(coupling_ptr + j * coupling_stride + j) + tl.zeros((ROWS,), tl.float32)
        later = tl.load(coupling_ptr + j * coupling_stride + column, mask=column < end, other=0.0)
        wanted = tl.sum(tl.where((column == j)[:, None], x, 0.0), 0)
        if DESCENT:
            before = tl.load(value_ptr + weight * width * rows + j * wide_rows + row, mask=there, other=0.0)
            wanted = before + tl.div_rn(wanted, diagonal)
        if BASE == PLANES:
            code, value = _pick(own, all_ptr, rows, row, wanted, scale, PLANES)
        else:
            if salient:
                code, value = _pick(own, all_ptr, rows, row, wanted, scale, PLANES)
            else:
                code, value = _pick(own, base_ptr, rows, row, wanted, scale, BASE)
        if DESCENT:
            change = before - value
            x += later[:, None] * change[None, :]
        else:
            change = tl.div_rn(wanted - value, diagonal)
            x -= later[:, None] * change[None, :]
        tl.store(step_ptr + j * wide_rows + row, change, mask=there)
        words = _with_bits(words, code, j - start, PLANES)
    salient_here = tl.load(salient_ptr + column, mask=column < end, other=0) != 0
    at = weight * sign_next + row.to(tl.int64)[None, :] * sign_stride + column[:, None]
    for p in tl.static_range(PLANES):
        sign = ((words[p][None, :] >> place[:, None]) & 1).to(tl.float32) * 2.0 - 1.0
        tl.store(sign_ptrs[p] + at, sign, mask=inside if p < BASE else inside & salient_here[:, None])


def feed_back(
    weight: Tensor, signs: tuple[Tensor, ...], levels: Levels, inverse_factor: Tensor, base_planes: int
) -> Tensor:
    """Binarize a block column by column; each error moves the later columns.

    Args:
        weight: fp32 [..., rows, width]: of one weight, or of a stack of them, as all that follows.
        signs: fp32 [..., rows, width] of every plane, of the same strides, columns contiguous; filled with ±1 where a
            column has the plane.
        levels: what may be chosen.
        inverse_factor: U, upper triangular, fp32 [..., width, width], columns contiguous.
        base_planes: how many of the planes every column has.

    Returns:
        ``(x_j − q_j) / U_jj`` [..., rows, width], rows contiguous.
    """
    rest = weight.mT.clone(memory_format=torch.contiguous_format)
    return _go_through(_Block(rest, rest, signs, levels, inverse_factor, base_planes), descent=False)


def descend(
    gradient: Tensor, value: Tensor, signs: tuple[Tensor, ...], levels: Levels, hessian: Tensor, base_planes: int
) -> Tensor:
    """One sweep over a block's columns; each takes the level at which ``E H Eᵀ`` is least, given all others.

    Args:
        gradient: ``E H`` of these columns, fp32 [..., rows, width].
        value: Q, fp32 [..., rows, width].
        signs: as of `feed_back`.
        levels: what may be chosen.
        hessian: H of these columns, fp32 [..., width, width], columns contiguous.
        base_planes: how many of the planes every column has.

    Returns:
        By how much every entry of Q has fallen, and ``E = T − Q`` risen, [..., rows, width], rows contiguous.
    """
    rest = gradient.mT.clone(memory_format=torch.contiguous_format)
    return _go_through(_Block(rest, value.mT.contiguous(), signs, levels, hessian, base_planes), descent=True)


class _Block(NamedTuple):
    """What the launches of a block have in common; see the kernel."""

    x: Tensor
    value: Tensor
    signs: tuple[Tensor, ...]
    levels: Levels
    coupling: Tensor
    base_planes: int


def _go_through(block: _Block, descent: bool) -> Tensor:
    *_, width, rows = block.x.shape
    steps = torch.empty_like(block.x)
    x, step, coupling, sign = (_stack(each) for each in (block.x, steps, block.coupling, block.signs[0]))
    with on_device(x.device):
        for start in range(0, width, TILE):
            end = min(start + TILE, width)
            column_kernel[(ceil_div(rows, ROWS), len(x))](
                block.x,
                block.value,
                steps,
                block.signs,
                block.levels,
                block.coupling,
                rows,
                width,
                start,
                end,
                sign.stride(1),
                sign.stride(0),
                coupling.stride(1),
                coupling.stride(0),
                BASE=block.base_planes,
                PLANES=len(block.signs),
                DESCENT=descent,
                ROWS=ROWS,
                TILE=TILE,
                num_warps=WARPS,
                num_stages=1,
            )
            later = coupling[:, start:end, end:].mT
            x[:, end:].baddbmm_(later, step[:, start:end], alpha=1.0 if descent else -1.0)
    return steps.mT


def _stack(matrices: Tensor) -> Tensor:
    """A stack of matrices as it is, and one matrix as a stack of one."""
    return matrices if matrices.ndim == 3 else matrices[None]
