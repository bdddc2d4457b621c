"""`solve` from the rows of an input instead of its Hessian: the same steps, products with few rows in their place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optimum_sab.core.code import NO_CODE
from optimum_sab.core.coded import START_ITERATIONS, coded_fit
from optimum_sab.core.columns import ColumnLoops
from optimum_sab.core.descent import SweptBlock
from optimum_sab.core.factored_rows import FactoredRows, factor_rows, gram_factor
from optimum_sab.core.forward_pass import forward_pass
from optimum_sab.core.hessian import singular
from optimum_sab.core.parts import part
from optimum_sab.core.planes import WeightFit
from optimum_sab.core.refit_by_rows import RowOutputs, refit_row_scale
from optimum_sab.core.row_scale import round_row_scale
from optimum_sab.core.rows import WeightedRows
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import Solution, require_finite
from optimum_sab.core.target import shrunk_alpha

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def solvable_by_rows(settings: LayerSettings) -> bool:
    """Whether `solve_rows` knows these settings; it knows no Hessians of single modalities."""
    return settings.significance != "modality"


def solve_rows(
    weight: Float[Tensor, "out in"], rows: WeightedRows, settings: LayerSettings, name: str, loops: ColumnLoops
) -> Solution:
    """Binarize a weight whose squares fp32 holds: what `solve` finds from the rows' second moments, but for rounding.

    Args:
        weight: W, fp32 on the rows' device.
        rows: the inputs.
        settings: see `solvable_by_rows`.
        name: the module's, for messages.
        loops: what goes from column to column.

    Raises:
        NonFiniteError, SingularHessianError: as `solve`.
    """
    with part("factorization"):
        factored = factor_rows(rows.quantized, settings.damping, settings.block_size, name)
    with part("target"):
        correction = _correction(weight, rows)
    with part("cross-validation"):
        alpha = _propagation(correction, rows, settings, name)
    with part("target"):
        target = weight
        if alpha and correction is not None:  # W + α P (X̂ X̂ᵀ + λ I)⁻¹ X̂
            solved = torch.cholesky_solve(correction.T.double(), factored.gram_factor).T.float()
            target = torch.addmm(weight, solved, factored.rows, alpha=alpha)
        target = target.masked_fill(factored.dead, 0.0)
        outputs = target @ factored.rows.T
    diagonal = factored.diagonal
    error_weight = diagonal if settings.significance == "hessian" else torch.ones_like(diagonal)
    if settings.code == NO_CODE:
        fit, miss = _fit(target, outputs, factored, error_weight, (settings, loops))
    else:
        start = settings.replace(code=NO_CODE, sweeps=0, iterations=min(settings.iterations, START_ITERATIONS))
        fit, miss = _fit(target, outputs, factored, error_weight, (start, loops))
        pull = torch.addmm(target * factored.ridge, outputs, factored.rows)
        fit, miss = coded_fit(fit, target, pull, factored, settings, loops.search), None
    planes = fit.planes()
    with part("errors"):
        if miss is None:
            miss = (target - planes.dequantize()) @ factored.rows.T
        below = float(outputs.square().sum())
        error = float(miss.square().sum()) / below if below > 0 else 0.0
    require_finite(error, name)
    return Solution(planes, error, None, alpha)


def _correction(weight: Tensor, rows: WeightedRows) -> Tensor | None:
    """P [out, rows], with which ``W C + R`` is ``P X̂``; None with one stream."""
    apart, residual = rows.apart, rows.residual
    if apart is None:
        return None if residual is None else residual.T
    return weight @ apart.T if residual is None else torch.addmm(residual.T, weight, apart.T)


def _propagation(correction: Tensor | None, rows: WeightedRows, settings: LayerSettings, name: str) -> float:
    """α, as `solve` chooses it."""
    if correction is None:
        return 0.0
    if settings.propagation is not None:
        return settings.propagation
    halves = [slice(0, rows.half), slice(rows.half, len(rows.quantized))]
    X = [rows.quantized[half] for half in halves]
    if not all(bool(each.any()) for each in X):
        return 0.0
    cross = X[0] @ X[1].T
    found = []
    for here, there, products in ((0, 1, cross), (1, 0, cross.T)):
        # D = P (X̂ X̂ᵀ + λ I)⁻¹ X̂ of here; its outputs on the rows of there
        mean = float(X[here].square().sum(dtype=torch.float64)) / X[here].shape[1]
        factor = gram_factor(X[here], settings.damping * mean)
        if factor is None:
            raise singular(settings.damping, name)
        solved = torch.cholesky_solve(products.double(), factor).float()
        moved, wanted = correction[:, halves[here]] @ solved, correction[:, halves[there]]
        below = float(moved.square().sum(dtype=torch.float64))
        found.append(float((moved * wanted).sum(dtype=torch.float64)) / below if below > 0 else 0.0)
    return shrunk_alpha(found)


def _fit(
    target: Tensor,
    outputs: Tensor,
    factored: FactoredRows,
    error_weight: Tensor,
    how: tuple[LayerSettings, ColumnLoops],
) -> tuple[WeightFit, Tensor | None]:
    """Plain planes, and what their outputs miss, ``E X̂ᵀ``; None without a refit."""
    settings, loops = how
    fit = forward_pass(target, factored, error_weight, settings, loops, loops.fit)
    if not settings.refit:
        return fit, None
    miss = outputs
    inside = [factored.local(start, end) for start, end in fit.bounds] if settings.sweeps else []
    for sweep in range(settings.sweeps + 1):
        if sweep:
            with part("descent"):
                _descend(fit, target, miss, factored, (inside, loops))
        with part("refit"):
            made = RowOutputs.of(fit, factored)
            found = refit_row_scale(fit, made, target, outputs, factored)
            fit.row_scale = round_row_scale(found, settings.row_scale)
            miss = made.missed(fit, outputs)
    return fit, miss


def _descend(
    fit: WeightFit, target: Tensor, miss: Tensor, factored: FactoredRows, how: tuple[list[Tensor], ColumnLoops]
) -> None:
    """`descend_signs`, with ``E H = (E X̂ᵀ) X̂ + λ E``; ``miss`` is E X̂ᵀ, and ``how`` begins with H of every block."""
    inside, loops = how
    for k, (start, end) in enumerate(fit.bounds):
        X, value = factored.rows[:, start:end], fit.block(k)
        error = target[:, start:end] - value
        before = error.clone()
        gradient = torch.addmm(error, miss, X, beta=factored.ridge)
        loops.sweep(SweptBlock(fit, k, gradient, value, error, inside[k]))
        if end < target.shape[1]:
            miss = torch.addmm(miss, error.sub_(before), X.T)
