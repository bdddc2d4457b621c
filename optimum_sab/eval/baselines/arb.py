"""ARB-LLM_RC (2410.03129): row and column scales refined in turn; and SAB-LVLM as published, which weighs the fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.hessian import FactoredHessian, InputStatistics, factor_hessian
from optimum_sab.core.saliency import saliency
from optimum_sab.core.significance import significance_map
from optimum_sab.eval.baselines.blockwise import binarize, compensated, salient_columns, split_by_magnitude
from optimum_sab.eval.baselines.simulated import Simulated, Storage, checked

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

ROUNDS = 15


def arb_rc(
    weight: Float[Tensor, "out in"],
    statistics: InputStatistics,
    column_groups: bool = False,
    rounds: int = ROUNDS,
    damping: float = 0.01,
) -> Simulated:
    """Alternating refined binarization with row and column scales.

    ``Ŵ = a cᵀ ⊙ B`` per block, order 2 on salient columns. The other columns are split in two magnitude groups with a
    row scale each; with ``column_groups`` (the column-group bitmap, CGB) the salient ones are too.

    Args:
        weight: W.
        statistics: the balanced Hessian compensates.
        column_groups: CGB.
        rounds: of the alternation.
        damping: share of the Hessian's mean diagonal added to it.
    """
    W = checked(weight)
    factored = factor_hessian(statistics.hessian, damping)
    return _alternating(W, factored, torch.ones(W.shape[1], device=W.device), column_groups, rounds)


def sab_published(
    weight: Float[Tensor, "out in"], statistics: InputStatistics, rounds: int = ROUNDS, damping: float = 0.01
) -> Simulated:
    """SAB-LVLM as published (2607.01876): ARB-LLM_RC with CGB, every fit weighted with Λ² (method.md section 5).

    The Hessian that compensates has seen text tokens alone, as in the paper's repository; where no token is text, it is
    the balanced one.
    """
    W = checked(weight)
    text = statistics.by_modality.get("text", statistics.hessian)
    factored = factor_hessian(text, damping)
    inverse = [factor_hessian(H, damping).inverse.diagonal() for H in statistics.by_modality.values()]
    significance = significance_map(W, torch.stack(inverse)).map
    return _alternating(W, factored, significance.square(), True, rounds)


def _alternating(
    W: Tensor, factored: FactoredHessian, significance: Tensor, column_groups: bool, rounds: int
) -> Simulated:
    diagonal = factored.inverse_factor.diagonal()
    storage = Storage(*W.shape)

    def quantize(block: Tensor, columns: slice) -> Tensor:
        error_weight = significance[columns]
        if not bool((error_weight > 0).any()):
            error_weight = torch.ones_like(error_weight)  # Λ = 0 all over the block says nothing about it
        salient = salient_columns(block, saliency(block, diagonal[columns]).sum(0))
        inside = torch.ones_like(block) * salient
        width, count = block.shape[1], int(salient.sum())
        storage.signs(width)
        storage.signs(count)
        storage.bitmap(width if column_groups else width - count)
        storage.column_bitmap(width)
        storage.column_scales(width + count)
        storage.row_scales(6 if column_groups else 4)
        rest = _groups(block, 1.0 - inside, error_weight, split=True)
        dense = _groups(block, inside, error_weight, split=column_groups)
        return _fit(block, rest, error_weight, 1, rounds) + _fit(block, dense, error_weight, 2, rounds)

    result = compensated(W, factored, quantize)
    return Simulated(result, storage.per_weight)


def _groups(block: Tensor, part: Tensor, error_weight: Tensor, split: bool) -> list[Tensor]:
    """The masks of a part's magnitude groups."""
    if not split:
        return [part]

    def error(lower: Tensor, upper: Tensor) -> Tensor:
        left = part * block - binarize(block, lower) - binarize(block, upper)
        return (error_weight * left.square()).sum()

    upper = split_by_magnitude(block, part, error)
    return [part - upper, upper]


@dataclass
class _Plane:
    """One plane of a part: a row scale per group, spread over the entries, and a column scale."""

    rows: Tensor  # [out, width], the row scale of each entry's group
    columns: Tensor  # [width]
    sign: Tensor  # [out, width]

    def value(self) -> Tensor:
        return self.rows * self.columns * self.sign


def _fit(block: Tensor, groups: list[Tensor], error_weight: Tensor, order: int, rounds: int) -> Tensor:
    """Alternate ``a``, ``c`` and ``B`` of every plane, each exact given the rest, under the error weight Λ²."""
    part = torch.stack(groups).sum(0)
    planes: list[_Plane] = []
    left = block * part
    for _ in range(order):
        sign = torch.where(left >= 0, 1.0, -1.0) * part
        plane = _Plane(torch.zeros_like(block), torch.ones_like(block[0]), sign)
        _update_rows(plane, left, groups, error_weight)
        planes.append(plane)
        left = left - plane.value()
    for _ in range(rounds):
        for plane in planes:
            wanted = block * part - sum(other.value() for other in planes if other is not plane)
            _update_rows(plane, wanted, groups, error_weight)
            _update_columns(plane, wanted)
        _update_signs(planes, block, part)
    return torch.stack([plane.value() for plane in planes]).sum(0)


def _update_rows(plane: _Plane, wanted: Tensor, groups: list[Tensor], error_weight: Tensor) -> None:
    """``a[i] = Σ_j Λ² c B W / Σ_j Λ² c²`` over every group's entries."""
    pull = error_weight * plane.columns * plane.sign * wanted
    push = error_weight * plane.columns.square()
    plane.rows = torch.zeros_like(plane.rows)
    for mask in groups:
        scale = (pull * mask).sum(1, keepdim=True) / (push * mask).sum(1, keepdim=True).clamp_min(1e-20)
        plane.rows += scale * mask


def _update_columns(plane: _Plane, wanted: Tensor) -> None:
    """``c[j] = Σ_i a B W / Σ_i a²``; Λ is constant along a column and cancels."""
    below = plane.rows.square().sum(0)
    c = (plane.rows * plane.sign * wanted).sum(0) / below.clamp_min(1e-20)
    plane.columns = torch.where(below > 0, c, plane.columns)


def _update_signs(planes: list[_Plane], block: Tensor, part: Tensor) -> None:
    """``B = sign`` of what a plane stands for, or for two planes the nearest of the four sums."""
    scales = [plane.rows * plane.columns for plane in planes]
    if len(planes) == 1:
        planes[0].sign = torch.where(block * scales[0] >= 0, 1.0, -1.0) * part
        return
    best: Tensor | None = None
    for first in (-1.0, 1.0):
        for second in (-1.0, 1.0):
            distance = (block - first * scales[0] - second * scales[1]).abs()
            if best is None:
                best = distance
                signs = [torch.full_like(block, first), torch.full_like(block, second)]
                continue
            closer = distance < best
            best = torch.where(closer, distance, best)
            signs = [
                torch.where(closer, torch.full_like(s, value), s)
                for s, value in zip(signs, (first, second), strict=True)
            ]
    for plane, sign in zip(planes, signs, strict=True):
        plane.sign = sign * part
