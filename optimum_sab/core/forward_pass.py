"""The first pass over a weight: block after block is fitted, and its error passed on to the columns behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from optimum_sab.core.alternating import fit_block
from optimum_sab.core.columns import ColumnLoops, Fit
from optimum_sab.core.feedback import block_feedback
from optimum_sab.core.parts import part
from optimum_sab.core.planes import WeightFit, block_bounds
from optimum_sab.core.row_scale import round_column_scale, round_row_scale
from optimum_sab.core.saliency import saliency, salient_mask
from optimum_sab.core.settings import LayerSettings

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class Factors(Protocol):
    """What the pass reads of a factored Hessian; see `FactoredHessian`."""

    @property
    def inverse_factor(self) -> Float[Tensor, "in in"]: ...

    @property
    def dead(self) -> Bool[Tensor, " in"]: ...


def forward_pass(
    target: Tensor,
    factored: Factors,
    error_weight: Tensor,
    settings: LayerSettings,
    loops: ColumnLoops,
    block_fit: Fit = fit_block,
) -> WeightFit:
    """Fit block after block, each on what the error feedback of the earlier ones made of it.

    Args:
        target: T [out, in].
        factored: of the damped Hessian.
        error_weight: Λ² of the alternating fit, [in]; dead columns weigh nothing, whatever it says.
        settings: see `LayerSettings`.
        loops: what goes from column to column.
        block_fit: the alternating fit.

    Returns:
        Scales as stored; the signs are chosen.
    """
    error_weight = error_weight.masked_fill(factored.dead, 0.0)
    found = WeightFit.empty(target, settings)
    width = target.shape[1]
    U = factored.inverse_factor
    rest = target.clone()
    for k, (start, end) in enumerate(block_bounds(width, settings.block_size)):
        block = rest[:, start:end].masked_fill(factored.dead[start:end], 0.0)
        score = saliency(block, U.diagonal()[start:end]).sum(0)
        salient = salient_mask(score, settings.salient_columns(end - start))
        weight = error_weight[start:end]
        if not bool((weight > 0).any()):
            weight = (~factored.dead[start:end]).float()
        with part("alternating fit"):
            fit = block_fit(block, weight[None], salient, settings)
        fit.column_scale = round_column_scale(fit.column_scale.masked_fill(factored.dead[start:end], 0.0))
        fit.row_scale = round_row_scale(fit.row_scale[:, None], settings.row_scale)[:, 0]
        corner = U[start:end, start:end]
        with part("feedback"):
            if settings.feedback == "column":
                errors = loops.feedback(block, fit, corner, settings.base_planes)
            else:
                errors = block_feedback(block, fit, corner)
            if end < width:
                rest[:, end:] -= errors @ U[start:end, end:]
        for p in range(settings.planes):
            found.signs[p][:, start:end] = fit.sign[p]
        found.salient[start:end] = salient
        found.row_scale[:, k], found.column_scale[start:end] = fit.row_scale, fit.column_scale
    return found
