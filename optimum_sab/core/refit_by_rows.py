"""The joint refit of a row's scales, from the outputs that every plane and block makes of few input rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.factored_rows import FactoredRows
from optimum_sab.core.planes import WeightFit
from optimum_sab.core.refit import RIDGE

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class RowOutputs:
    """``v X̂ᵀ`` of every basis vector v: a plane's signs times c inside one block.

    Attributes:
        made: [out, planes · blocks, rows].
        columns: of every plane and block, the columns that it has.
    """

    made: Float[Tensor, "out basis rows"]
    columns: list[list[Tensor | slice]]

    @classmethod
    def of(cls, fit: WeightFit, factored: FactoredRows) -> RowOutputs:
        """Of a fit's signs and column scales."""
        X = (factored.rows * fit.column_scale).T.contiguous()  # [in, rows]
        bounds = fit.bounds
        out = fit.signs[0].shape[0]
        made = X.new_empty(out, len(fit.signs) * len(bounds), X.shape[1])
        everywhere: list[Tensor | slice] = [slice(start, end) for start, end in bounds]
        salient: list[Tensor | slice] = [start + fit.salient[start:end].nonzero()[:, 0] for start, end in bounds]
        base = fit.settings.base_planes
        columns = [everywhere if p < base else salient for p in range(len(fit.signs))]
        for p, sign in enumerate(fit.signs):
            for k, own in enumerate(columns[p]):
                torch.mm(sign[:, own], X[own], out=made[:, p * len(bounds) + k])
        return cls(made, columns)

    def missed(self, fit: WeightFit, outputs: Float[Tensor, "out rows"]) -> Float[Tensor, "out rows"]:
        """``E X̂ᵀ``: what the planes' outputs miss of the target's."""
        scale = fit.row_scale.flatten(0, 1).T[:, None]  # [out, 1, K]
        return outputs - (scale @ self.made)[:, 0]


def refit_row_scale(
    fit: WeightFit,
    outputs: RowOutputs,
    target: Float[Tensor, "out in"],
    wanted: Float[Tensor, "out rows"],
    factored: FactoredRows,
) -> Float[Tensor, "planes blocks out"]:
    """What `optimum_sab.core.refit.refit_row_scale` finds, ``v H vᵀ`` being ``(v X̂ᵀ)(v X̂ᵀ)ᵀ + λ v vᵀ``.

    Args:
        fit: planes, their signs chosen.
        outputs: of its signs.
        target: T.
        wanted: ``T X̂ᵀ``.
        factored: the damped Hessian.
    """
    planes, blocks = fit.row_scale.shape[:2]
    gram = outputs.made @ outputs.made.mT
    right = (outputs.made @ wanted[:, :, None])[:, :, 0]
    k = torch.arange(blocks, device=gram.device)
    for p in range(planes):
        own = outputs.columns[p]
        pull = [(fit.signs[p][:, part] * target[:, part]) @ fit.column_scale[part] for part in own]
        right[:, p * blocks + k] += factored.ridge * torch.stack(pull, 1)
        for q in range(p, planes):
            both = _products(fit, outputs.columns[q], p, q).mul_(factored.ridge)
            gram[:, p * blocks + k, q * blocks + k] += both
            if p != q:
                gram[:, q * blocks + k, p * blocks + k] += both
    diagonal = gram.diagonal(dim1=1, dim2=2)
    floor = diagonal.amax(1, keepdim=True) * 1e-8 + torch.finfo(gram.dtype).tiny
    diagonal.add_(RIDGE * diagonal + floor)
    found = torch.linalg.solve(gram, right[:, :, None])[:, :, 0]
    return found.view(-1, planes, blocks).permute(1, 2, 0).contiguous()


def _products(fit: WeightFit, columns: list[Tensor | slice], p: int, q: int) -> Tensor:
    """``v vᵀ`` of two planes in every block, [out or 1, blocks]; q has the fewer columns."""
    square = fit.column_scale.square()
    if p == q:
        return torch.stack([square[own].sum() for own in columns])[None]
    first, second = fit.signs[p], fit.signs[q]
    return torch.stack([(first[:, own] * second[:, own]) @ square[own] for own in columns], 1)
