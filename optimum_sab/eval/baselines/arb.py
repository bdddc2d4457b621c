"""ARB-LLM_RC (2410.03129): row and column scales refined in turn; and SAB-LVLM as published, which weighs the fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.factorization import FactoredHessian, factor_hessian
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.planes import sign_of
from optimum_sab.core.saliency import saliency
from optimum_sab.core.significance import significance_map
from optimum_sab.eval.baselines.blockwise import compensated
from optimum_sab.eval.baselines.simulated import Simulated, Storage, checked
from optimum_sab.eval.baselines.split import salient_columns, split_by_magnitude

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

ROUNDS = 15
# Λ² from which on a column counts. Where Λ vanishes, a row's scale would be 0/0; so it is the plain fit's there.
LEAST_WEIGHT = 1e-8


def arb_rc(
    weight: Float[Tensor, "out in"],
    statistics: InputStatistics,
    column_groups: bool = False,
    row_thresholds: bool = False,
    rounds: int = ROUNDS,
    damping: float = 0.01,
) -> Simulated:
    """Alternating refined binarization with row and column scales.

    Per block of 128, salient columns take two planes and the others one; the others are split in two magnitude groups,
    and with ``column_groups`` (the column-group bitmap, CGB) the salient ones are too. Every plane of every group is
    ``a cᵀ ⊙ B`` with scales of its own. Bits per block with c salient columns:

    - signs ``1 + c/128``, columns ``1/out``;
    - bitmap of groups ``1 − c/128``, with CGB ``1``;
    - row scales ``16 · 4/128``, with CGB ``16 · 6/128``;
    - column scales ``16 · 2/out``, with CGB ``16 · (2 + 2c/128)/out``.

    Args:
        weight: W.
        statistics: the balanced Hessian compensates.
        column_groups: CGB.
        row_thresholds: every row has break points of its own between its magnitude groups (ours, not the paper's).
        rounds: of the alternation.
        damping: share of the Hessian's mean diagonal added to it.

    Raises:
        NonFiniteError: the weight or the Hessian holds NaN or inf.
    """
    W = checked(weight)
    factored = statistics.factored(damping)
    return _alternating(W, factored, torch.ones_like(W[0]), column_groups, rounds, row_thresholds)


def sab_published(
    weight: Float[Tensor, "out in"], statistics: InputStatistics, rounds: int = ROUNDS, damping: float = 0.01
) -> Simulated:
    """SAB-LVLM as published (2607.01876): ARB-LLM_RC with CGB, every fit weighted with Λ² (method.md section 5).

    The Hessian that compensates, and that says which columns are salient, has seen text tokens alone, as in the paper's
    repository. Where no modality is called "text", it is the balanced one: the only modality there is, if there is one.

    Args:
        weight: W.
        statistics: the modalities' Hessians make Λ.
        rounds: of the alternation.
        damping: share of a Hessian's mean diagonal added to it.

    Raises:
        NonFiniteError: the weight or a Hessian holds NaN or inf.
    """
    W = checked(weight)
    factored = factor_hessian(statistics.by_modality.get("text", statistics.hessian), damping)
    inverse = [factor_hessian(H, damping).inverse_diagonal for H in statistics.by_modality.values()]
    significance = significance_map(W, torch.stack(inverse)).map
    return _alternating(W, factored, significance.square().clamp_min(LEAST_WEIGHT), True, rounds)


def _alternating(
    W: Tensor,
    factored: FactoredHessian,
    error_weight: Tensor,
    column_groups: bool,
    rounds: int,
    row_thresholds: bool = False,
) -> Simulated:
    diagonal = factored.inverse_factor.diagonal()
    storage = Storage(*W.shape)

    def quantize(block: Tensor, columns: slice) -> Tensor:
        salient = salient_columns(saliency(block, diagonal[columns]))
        storage.column_bitmap(block.shape[1])
        result = torch.empty_like(block)
        for chosen, order, split in ((salient, 2, column_groups), (~salient, 1, True)):
            part, importance = block[:, chosen], error_weight[columns][chosen]
            groups = _groups(part, importance, split, row_thresholds)
            storage.signs(part.shape[1], planes=order)
            storage.bitmap(part.shape[1] if split else 0)
            storage.row_scales(order * len(groups))
            storage.column_scales(order * len(groups) * part.shape[1])
            fits = [_fit(part, group, importance, order, rounds) for group in groups]
            result[:, chosen] = torch.stack(fits).sum(0)
        return result

    return Simulated(compensated(W, factored, quantize), storage.per_weight)


def _groups(part: Tensor, error_weight: Tensor, split: bool, row_thresholds: bool) -> list[Bool[Tensor, "out width"]]:
    """The masks of a part's magnitude groups; the break point is that of one plane, in salient columns too."""
    if not split or not part.shape[1]:
        return [torch.ones_like(part, dtype=torch.bool)] * (2 if split else 1)
    upper = split_by_magnitude(part, error_weight, row_thresholds)
    return [~upper, upper]


@dataclass
class _Plane:
    """``a cᵀ ⊙ B`` over the entries of a group; B is 0 elsewhere."""

    rows: Float[Tensor, "out 1"]
    columns: Float[Tensor, " width"]
    sign: Float[Tensor, "out width"]

    @property
    def value(self) -> Tensor:
        return self.rows * self.columns * self.sign


def _fit(values: Tensor, group: Tensor, error_weight: Tensor, order: int, rounds: int) -> Tensor:
    """Alternate a, c and B of every plane of a group, each exact given the rest, under the error weight Λ²."""
    wanted = values * group
    planes: list[_Plane] = []
    for _ in range(order):
        rows = _ratio((wanted.abs() * error_weight).sum(1, keepdim=True), (error_weight * group).sum(1, keepdim=True))
        plane = _Plane(rows, torch.ones_like(error_weight), sign_of(wanted) * group)
        planes.append(plane)
        wanted = wanted - plane.value
    for _ in range(rounds):
        for plane in planes:
            left = values * group - sum(other.value for other in planes if other is not plane)
            _update_scales(plane, left, error_weight)
        _update_signs(planes, values, group)
    return torch.stack([plane.value for plane in planes]).sum(0)


def _update_scales(plane: _Plane, wanted: Tensor, error_weight: Tensor) -> None:
    """``a_i = Σ_j Λ² c B W / Σ_j Λ² c²``, then ``c_j = Σ_i a B W / Σ_i a²``, where Λ, a column's, cancels."""
    used = plane.sign.abs()
    plane.rows = _ratio(
        (error_weight * plane.columns * plane.sign * wanted).sum(1, keepdim=True),
        (used * error_weight * plane.columns.square()).sum(1, keepdim=True),
    )
    plane.columns = _ratio((plane.rows * plane.sign * wanted).sum(0), (used * plane.rows.square()).sum(0))


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """A least-squares scale; 0 where it has no entry to fit."""
    return torch.where(below > 0, above / below, torch.zeros_like(above))


def _update_signs(planes: list[_Plane], values: Tensor, group: Tensor) -> None:
    """The nearest of the ``2^order`` levels: a first plane's sign, and what is left decides the later one's."""
    scales = [plane.rows * plane.columns for plane in planes]
    if len(planes) == 1:
        planes[0].sign = sign_of(values * scales[0]) * group
        return
    first, second = scales
    # B₁ decides between two pairs of levels; within a pair B₂ follows what B₁ leaves.
    up, down = (values - first).abs() - second.abs(), (values + first).abs() - second.abs()
    planes[0].sign = torch.where(up.abs() <= down.abs(), 1.0, -1.0) * group
    planes[1].sign = sign_of((values - planes[0].sign * first) * second) * group
