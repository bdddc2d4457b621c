"""Closed-form refits of scales under the full Hessian, signs fixed: of a row together, and of all columns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.factorization import WIDE
from optimum_sab.core.planes import WeightFit, block_bounds, block_sums, columns_where, take_columns, take_rows
from optimum_sab.core.row_scale import round_column_scale, round_row_scale

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

RIDGE = 1e-4  # relative to each plane's own energy; keeps rows with coinciding planes solvable
GRAM_BYTES = 2**29  # bound on the Gram matrices held at once
TILE = 2048  # columns of a product that are looked at while they are in the cache


def refit_row_scale(
    signs: list[Float[Tensor, "... out in"]],
    column_scale: Float[Tensor, "... in"],
    pull: Float[Tensor, "... out in"],
    hessian: Float[Tensor, "... in in"],
    block_size: int,
) -> Float[Tensor, "planes blocks ... out"]:
    """Minimise ``(t_i − Σ a v) H (t_i − Σ a v)ᵀ`` over all ``K = planes · blocks`` scales of row i together.

    ``v`` is a plane's signs times ``c`` inside one block and zero elsewhere. The basis [out, K, in] is never
    built: for each (plane, block) products with ``H[block, :]`` and segmented sums give a row of the K×K Gram
    matrices. These are symmetric: from `WIDE` inputs on only blocks from a row's own on are computed, and of a
    residual plane only the columns that it has.

    Args:
        signs: one [..., out, in] per plane, entries ±1, 0 where a residual plane has no column; of a stack of weights
            where there are dots.
        column_scale: c [..., in].
        pull: ``T H`` [..., out, in], T the weight to approximate; the same for every refit of a weight.
        hessian: damped H [..., in, in].
        block_size: columns per block.
    """
    *stack, out, width = pull.shape
    planes, blocks = len(signs), len(block_bounds(width, block_size))
    K = planes * blocks
    columns = [_columns(sign, block_size) for sign in signs] if width >= WIDE else None
    rows = max(1, min(out, GRAM_BYTES // (4 * math.prod(stack) * (K * K + 6 * width))))  # at once, of every weight
    result = pull.new_empty(*stack, out, K)
    for first in range(0, out, rows):
        part = slice(first, min(first + rows, out))
        basis = [sign[..., part, :] * column_scale[..., None, :] for sign in signs]
        right = torch.cat([block_sums(each * pull[..., part, :], block_size) for each in basis], -1)
        gram = _gram(basis, columns, hessian, block_size)
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        floor = diagonal.amax(-1, keepdim=True) * 1e-8 + torch.finfo(gram.dtype).tiny
        diagonal.add_(RIDGE * diagonal + floor)
        result[..., part, :] = torch.linalg.solve(gram, right[..., None])[..., 0]
    return result.view(*stack, out, planes, blocks).movedim((-2, -1), (0, 1)).contiguous()


def refit_column_scale(
    values: Float[Tensor, "out in"],
    column_scale: Float[Tensor, " in"],
    pull: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
) -> Float[Tensor, " in"]:
    """Minimise ``Σ_i (t_i − c v_i) H (t_i − c v_i)ᵀ`` over all c together: ``(H ⊙ VᵀV) c = diag(Vᵀ T H)``.

    Args:
        values: V, the weight without column scales.
        column_scale: c as it is, to which the ridge draws.
        pull: ``T H``.
        hessian: damped H.
    """
    gram = (values.T @ values).mul_(hessian)
    right = (values * pull).sum(0) - gram @ column_scale
    diagonal = gram.diagonal()
    diagonal.add_(RIDGE * diagonal + diagonal.max() * 1e-8 + torch.finfo(torch.float32).tiny)
    return column_scale + torch.linalg.solve(gram, right)


def refit_rows(fit: WeightFit, pull: Float[Tensor, "... out in"], hessian: Float[Tensor, "... in in"]) -> None:
    """Row scales of all planes by least squares under the full Hessian, as stored."""
    found = refit_row_scale(fit.signs, fit.column_scale, pull, hessian, fit.settings.block_size)
    fit.row_scale = round_row_scale(found, fit.settings.row_scale)


def refit_columns(fit: WeightFit, pull: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]) -> None:
    """Column scales by least squares under the full Hessian, as stored.

    Row scales take their mean in a block over; they are to be refitted next.
    """
    found = refit_column_scale(fit.values(), fit.column_scale, pull, hessian)
    block = fit.settings.block_size
    for k, scale in enumerate(found.split(block)):
        norm = scale.abs().mean().clamp_min(torch.finfo(torch.float32).tiny)
        fit.row_scale[:, k] *= norm
        found[k * block : (k + 1) * block] = scale / norm
    fit.column_scale = round_column_scale(found.masked_fill(fit.column_scale == 0, 0.0))


def _columns(sign: Tensor, block_size: int) -> list[Tensor | slice]:
    """Of every block, the columns that a plane has; all rows of a weight have the same."""
    bounds = block_bounds(sign.shape[-1], block_size)
    present = sign[..., 0, :] != 0
    if bool(present.all()):
        return [slice(start, end) for start, end in bounds]
    return [start + columns_where(present[..., start:end]) for start, end in bounds]


def _gram(basis: list[Tensor], columns: list[list[Tensor | slice]] | None, hessian: Tensor, block_size: int) -> Tensor:
    """Gram matrices ``v H vᵀ`` of every row, [..., rows, K, K].

    Args:
        basis: of every plane, signs times c [..., rows, in].
        columns: of every plane and block, the columns it has; then one half is the other's mirror image. None computes
            all of it from all columns.
        hessian: damped H [..., in, in].
        block_size: columns per block.
    """
    (*rows, width), planes = basis[0].shape, len(basis)
    bounds = block_bounds(width, block_size)
    gram = basis[0].new_empty(*rows, planes, len(bounds), planes, len(bounds))
    tile = width if columns is None else block_size * max(1, TILE // block_size)
    for p in range(planes):
        for k, (start, stop) in enumerate(bounds):
            own = slice(start, stop) if columns is None else columns[p][k]
            left, weight = take_columns(basis[p], own), take_rows(hessian, own)
            for begin in range(0 if columns is None else start, width, tile):
                end = min(begin + tile, width)
                product = left @ weight[..., begin:end]
                blocks = slice(begin // block_size, -(-end // block_size))
                for q in range(planes):
                    gram[..., p, k, q, blocks] = block_sums(product * basis[q][..., begin:end], block_size)
    if columns is not None:
        i, j = torch.triu_indices(len(bounds), len(bounds), 1, device=gram.device)
        gram[..., j, :, i] = gram[..., i, :, j].transpose(-2, -1)  # [pairs, ..., rows, planes, planes]
    return gram.view(*rows, planes * len(bounds), planes * len(bounds))
