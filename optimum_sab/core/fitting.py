"""Plain planes are fitted: block after block with error feedback, then refits and sign descent."""

from __future__ import annotations

import torch

from optimum_sab.core.alternating import fit_block
from optimum_sab.core.columns import ColumnLoops
from optimum_sab.core.descent import descend_signs
from optimum_sab.core.feedback import block_feedback
from optimum_sab.core.parts import part
from optimum_sab.core.planes import WeightFit, block_bounds
from optimum_sab.core.problem import Problem
from optimum_sab.core.refit import refit_rows
from optimum_sab.core.row_scale import round_column_scale, round_row_scale
from optimum_sab.core.saliency import saliency, salient_mask
from optimum_sab.core.settings import LayerSettings


def fit_planes(problem: Problem, settings: LayerSettings, loops: ColumnLoops) -> WeightFit:
    """Fit plain planes to one weight, or to each of a stack.

    Args:
        problem: of one weight, or of a stack: a step is then one for all of them.
        settings: without a code.
        loops: what goes from column to column.
    """
    fit = _forward_pass(problem, settings, loops)
    if problem.pull is not None:
        for sweep in range(settings.sweeps + 1):
            if sweep:
                with part("descent"):
                    descend_signs(fit, problem.target, problem.hessian, loops.descend)
            with part("refit"):
                refit_rows(fit, problem.pull, problem.hessian)
    return fit


def _forward_pass(problem: Problem, settings: LayerSettings, loops: ColumnLoops) -> WeightFit:
    """Fit block after block, each on what the error feedback of the earlier ones made of it."""
    found = WeightFit.empty(problem.target, settings)
    width = problem.target.shape[-1]
    U = problem.inverse_factor
    rest = problem.target.clone()
    for k, (start, end) in enumerate(block_bounds(width, settings.block_size)):
        dead, weight = problem.dead[..., start:end], problem.error_weight[..., start:end]
        block = rest[..., start:end].masked_fill(dead[..., None, :], 0.0)
        score = saliency(block, U.diagonal(dim1=-2, dim2=-1)[..., start:end]).sum(-2)
        salient = salient_mask(score, settings.salient_columns(end - start))
        weight = torch.where((weight > 0).any(-1, keepdim=True), weight, (~dead).float())
        with part("alternating fit"):
            fit = fit_block(block, weight[..., None, :], salient, settings)
        fit.column_scale = round_column_scale(fit.column_scale.masked_fill(dead, 0.0))
        fit.row_scale = round_row_scale(fit.row_scale[:, None], settings.row_scale)[:, 0]
        corner = U[..., start:end, start:end]
        with part("feedback"):
            if settings.feedback == "column":
                errors = loops.feed_back(block, fit, corner, settings.base_planes)
            else:
                errors = block_feedback(block, fit, corner)
            if end < width:
                rest[..., end:] -= errors @ U[..., start:end, end:]
        for p in range(settings.planes):
            found.signs[p][..., start:end] = fit.sign[p]
        found.salient[..., start:end] = salient
        found.row_scale[:, k], found.column_scale[..., start:end] = fit.row_scale, fit.column_scale
    return found
