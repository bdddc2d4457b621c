"""The alternating significance-weighted fit of one block's planes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.planes import BlockFit, columns_where, sign_combinations, sign_into, sign_of, take_columns
from optimum_sab.core.settings import LayerSettings

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def objective(
    weight: Float[Tensor, "... out width"], fit: BlockFit, significance: Float[Tensor, "... rows width"]
) -> Float[Tensor, ""]:
    """``‖ Λ ⊙ (W − Ŵ) ‖²_F`` with ``significance`` = Λ² [1 or out, width] (method.md section 5)."""
    return (significance * (weight - fit.dequantize()).square()).sum()


def fit_block(
    weight: Float[Tensor, "... out width"],
    significance: Float[Tensor, "... rows width"],
    salient: Bool[Tensor, "... width"],
    settings: LayerSettings,
) -> BlockFit:
    """Alternate row scales, column scales and signs, each step exact, so that the objective never rises.

    Args:
        weight: one block of W, or of a stack of weights, each of which is fitted by itself.
        significance: error weight Λ² per entry, [..., 1, width] or [..., out, width], non-negative.
        salient: the columns that carry the residual planes, as many of every weight.
        settings: planes and iterations.
    """
    fit = _start(weight, significance, salient, settings)
    columns = columns_where(salient)
    narrow_sign = torch.stack([take_columns(sign, columns) for sign in fit.sign])
    narrow = _Narrow(columns, take_columns(weight, columns), narrow_sign, settings.base_planes)
    scratch = torch.empty_like(weight), torch.empty_like(weight)
    for _ in range(settings.iterations):
        _update_row_scale(weight, significance, fit, narrow, scratch)
        _update_column_scale(weight, significance, fit, scratch)
        _update_sign(weight, fit, narrow, scratch)
    norm = fit.column_scale.abs().mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    fit.column_scale = fit.column_scale / norm
    fit.row_scale = fit.row_scale * norm
    return fit


def _start(weight: Tensor, significance: Tensor, salient: Tensor, settings: LayerSettings) -> BlockFit:
    """Column scales from the mean magnitude, then plane after plane by the sign of what is left."""
    column = weight.abs().mean(-2)
    column = column / column.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    rest = weight / column.clamp_min(1e-12)[..., None, :]
    scales, signs = [], []
    for p in range(settings.planes):
        support = torch.ones_like(column) if p < settings.base_planes else salient.float()
        sign = sign_of(rest) * support[..., None, :]
        scale = (rest.abs() * support[..., None, :]).sum(-1) / support.sum(-1, keepdim=True).clamp_min(1.0)
        rest = rest - scale[..., None] * sign
        scales.append(scale)
        signs.append(sign)
    return BlockFit(torch.stack(scales), column, torch.stack(signs), salient)


# Two places of the block's shape, so that no step waits for new memory.
_Scratch = tuple["Tensor", "Tensor"]


@dataclass
class _Narrow:
    """The salient columns of a block by themselves: residual planes live on them alone.

    Attributes:
        columns: which, int64 [..., salient].
        weight: of them, [..., out, salient].
        sign: of every plane, [planes, ..., out, salient].
        base_planes: how many of the planes every column has.
    """

    columns: Tensor
    weight: Tensor
    sign: Tensor
    base_planes: int


def _update_row_scale(weight: Tensor, significance: Tensor, fit: BlockFit, narrow: _Narrow, scratch: _Scratch) -> None:
    """∂L/∂a = 0 for all planes of a row together: a small symmetric system per row."""
    planes, rows = len(fit.sign), weight.shape[:-1]
    base_planes, narrow_sign = narrow.base_planes, narrow.sign
    pulled = significance * fit.column_scale[..., None, :]
    linear, product = torch.mul(weight, pulled, out=scratch[0]), scratch[1]
    moment = significance * fit.column_scale.square()[..., None, :]  # one row where significance has one
    narrow_linear = narrow.weight * take_columns(pulled, narrow.columns)
    narrow_moment = take_columns(moment, narrow.columns).expand(*rows, -1)
    gram = weight.new_empty(*rows, planes, planes)
    right = weight.new_empty(*rows, planes)
    for p in range(planes):
        if p < base_planes:
            right[..., p] = torch.mul(fit.sign[p], linear, out=product).sum(-1)
        else:
            right[..., p] = (narrow_sign[p] * narrow_linear).sum(-1)
        for q in range(p, planes):
            if q < base_planes:
                if p == q:
                    value = moment.sum(-1)
                else:
                    value = torch.mul(fit.sign[p], fit.sign[q], out=product).mul_(moment).sum(-1)
            else:
                value = narrow_moment.sum(-1) if p == q else (narrow_sign[p] * narrow_sign[q] * narrow_moment).sum(-1)
            gram[..., p, q] = gram[..., q, p] = value
    fit.row_scale = _solve_small(gram, right).movedim(-1, 0).contiguous()


def _solve_small(gram: Tensor, right: Tensor) -> Tensor:
    """Least squares ``gram · x = right`` per row [..., P]; a vanishing ridge picks a solution where planes coincide."""
    ridge = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(gram.dtype).tiny * 1e8) * 1e-7
    gram = gram + ridge[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, right[..., None])[..., 0]


def _update_column_scale(weight: Tensor, significance: Tensor, fit: BlockFit, scratch: _Scratch) -> None:
    """∂L/∂c = 0: each column has one unknown. A column with no energy or no significance keeps its scale."""
    value, product = scratch
    torch.mul(fit.row_scale[0][..., None], fit.sign[0], out=value)
    for scale, sign in zip(fit.row_scale[1:], fit.sign[1:], strict=True):
        value.add_(torch.mul(scale[..., None], sign, out=product))
    below = torch.mul(value, value, out=product).mul_(significance).sum(-2)
    above = torch.mul(value, significance, out=product).mul_(weight).sum(-2)
    fit.column_scale = torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), fit.column_scale)


def _update_sign(weight: Tensor, fit: BlockFit, narrow: _Narrow, scratch: _Scratch) -> None:
    """Nearest of the level combinations, entry by entry: of the base planes everywhere, then of all on salient ones."""
    planes, base_planes = fit.sign.shape[0], narrow.base_planes
    if base_planes == 1:
        level = torch.mul(fit.row_scale[0][..., None], fit.column_scale[..., None, :], out=scratch[0])
        sign_into(fit.sign[0], level.mul_(weight))
    else:
        _nearest(weight, fit.row_scale[:base_planes], fit.column_scale, fit.sign[:base_planes], scratch)
    if planes > base_planes:
        places = torch.empty_like(narrow.weight), torch.empty_like(narrow.weight)
        narrow_scale = fit.column_scale.gather(-1, narrow.columns)
        _nearest(narrow.weight, fit.row_scale, narrow_scale, narrow.sign, places)
        fit.sign.scatter_(-1, narrow.columns[..., None, :].expand_as(narrow.sign), narrow.sign)


def _nearest(target: Tensor, row_scale: Tensor, column_scale: Tensor, sign: Tensor, scratch: _Scratch) -> None:
    """Fill ``sign`` [planes, ..., out, width] with those of the level nearest to every entry, the first of equals."""
    distance, best = scratch
    combos = sign_combinations(len(row_scale), target.device)
    levels = row_scale.movedim(0, -1) @ combos.T  # [..., out, 2**planes]
    pick = torch.zeros(target.shape, dtype=torch.uint8, device=target.device)
    best.fill_(float("inf"))
    for k in range(combos.shape[0]):
        torch.mul(levels[..., k, None], column_scale[..., None, :], out=distance)
        torch.sub(target, distance, out=distance).square_()
        pick.masked_fill_(distance < best, k)
        torch.minimum(best, distance, out=best)
    for p in range(len(row_scale)):
        torch.ge(pick.bitwise_and(1 << p), 1, out=sign[p]).mul_(2.0).sub_(1.0)
