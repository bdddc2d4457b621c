"""Binarize one weight: significance, block fits with error feedback, then refit and sign descent."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.alternating import fit_block
from optimum_sab.core.code import NO_CODE
from optimum_sab.core.coded import START_ITERATIONS, coded_fit
from optimum_sab.core.columns import IN_TORCH, ColumnLoops
from optimum_sab.core.descent import descend_signs
from optimum_sab.core.factorization import WIDE, FactoredHessian, factor_hessian, quadratic_form
from optimum_sab.core.feedback import block_feedback
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.magnitude import check_magnitude, extreme_power, times_power, with_outputs_scaled
from optimum_sab.core.parts import part
from optimum_sab.core.planes import BinaryPlanes, WeightFit, block_bounds
from optimum_sab.core.refit import refit_rows
from optimum_sab.core.row_scale import round_column_scale, round_row_scale
from optimum_sab.core.saliency import saliency, salient_mask
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.significance import Significance, significance_map
from optimum_sab.core.target import cross_validated_alpha, target_of
from optimum_sab.errors import CalibrationError, NonFiniteError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

JUDGED_ROWS = 1024


@dataclass(frozen=True)
class Solution:
    """What `solve` found.

    Attributes:
        planes: the binary planes, every scale already rounded to its stored precision.
        error: ``tr((W*−Q) H (W*−Q)ᵀ) / tr(W* H W*ᵀ)``, relative to the target, on the calibration inputs; of some
            `JUDGED_ROWS` rows, evenly spread, of a weight with more, and `WIDE` inputs.
        significance: Λ and its parts, or None where the setting is not "modality".
        propagation: α of the propagated target that was aimed at.
    """

    planes: BinaryPlanes
    error: float
    significance: Significance | None
    propagation: float


def output_error(
    weight: Float[Tensor, "out in"],
    approximation: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    energy: float | None = None,
) -> float:
    """Relative output error ``tr((W−Q) H (W−Q)ᵀ) / tr(W H Wᵀ)``; 0 where the layer's output is zero.

    Args:
        weight: W.
        approximation: Q.
        hessian: H, undamped.
        energy: ``tr(W H Wᵀ)``, where it is known.
    """
    below = quadratic_form(weight, hessian) if energy is None else energy
    above = quadratic_form(weight - approximation, hessian)
    return above / below if below > 0 else 0.0


def solve(
    weight: Float[Tensor, "out in"],
    statistics: InputStatistics,
    settings: LayerSettings,
    name: str = "the layer",
    loops: ColumnLoops = IN_TORCH,
) -> Solution:
    """Binarize ``weight``.

    Args:
        weight: W, any float dtype; computed in fp32 on the statistics' device.
        statistics: the inputs' second moments.
        settings: see `LayerSettings`.
        name: the module's name, for messages.
        loops: what goes from column to column on the statistics' device; changes time only.

    Raises:
        CalibrationError: ``significance`` is "modality" and the statistics hold no Hessians per modality.
        NonFiniteError: W or the Hessian holds NaN or inf, or what is found does.
        ConfigError: W is too large or too small for its row scales to be stored (`check_magnitude`).
        SingularHessianError: see `factor_hessian`.
    """
    W = weight.detach().to(statistics.hessian.device, torch.float32)
    check_magnitude(W, settings.row_scale, name)
    power = extreme_power(W)
    if not power:
        return _solve(W, statistics, settings, name, loops)
    found = _solve(times_power(W, -power), with_outputs_scaled(statistics, -power), settings, name, loops)
    scale = round_row_scale(times_power(found.planes.row_scale, power), settings.row_scale)
    return replace(found, planes=replace(found.planes, row_scale=scale))


def _solve(W: Tensor, statistics: InputStatistics, settings: LayerSettings, name: str, loops: ColumnLoops) -> Solution:
    """`solve` for weights whose squares fp32 holds."""
    with part("cross-validation"):
        alpha = _propagation(W, statistics, settings, name)  # first, since it needs other factors for as long
    with part("factorization"):
        factored = statistics.factored(settings.damping, name)
    with part("target"):
        target = target_of(W, statistics, factored, alpha)
    significance = None
    if settings.significance == "modality":
        if not statistics.by_modality:
            raise CalibrationError(
                f"significance='modality' needs the Hessians of each modality, which the calibration pass did not give "
                f"for {name}; use the 'hessian' pass, or another significance."
            )
        inverse = [factor_hessian(H, settings.damping, name).inverse_diagonal for H in statistics.by_modality.values()]
        significance = significance_map(W, torch.stack(inverse))
    pull = None
    if settings.refit:
        with part("refit"):
            pull = target @ factored.hessian
    weight = _error_weight(settings, factored, significance)
    if settings.code == NO_CODE:
        fit = _fit(target, pull, factored, weight, settings, loops)
    else:
        assert pull is not None
        start = settings.replace(code=NO_CODE, sweeps=0, iterations=min(settings.iterations, START_ITERATIONS))
        fit = _fit(target, pull, factored, weight, start, loops)
        fit = coded_fit(fit, target, pull, factored, settings, loops.search)
    planes = fit.planes()
    with part("errors"):
        some = _judged(*W.shape)
        energy = None if pull is None else _energy(target[some], pull[some], factored)
        error = output_error(target[some], planes.rows(some).dequantize(), statistics.hessian, energy)
    if not math.isfinite(error):
        raise NonFiniteError(
            f"the planes found for {name} hold NaN or inf: its weights or inputs differ by too many powers of ten; "
            f"leave it dense with modules_to_not_convert={[name]!r}."
        )
    return Solution(planes, error, significance, alpha)


def _judged(out: int, width: int) -> slice:
    """The rows that an error is reported of: all, or where that is work, some, evenly spread."""
    return slice(None, None, max(1, out // JUDGED_ROWS) if width >= WIDE else 1)


def _energy(target: Tensor, pull: Tensor, factored: FactoredHessian) -> float | None:
    """``tr(T H Tᵀ)`` of the undamped H by way of ``T H`` of the damped one; None where little of that is left."""
    damped = float((pull * target).sum())
    energy = damped - factored.added * float(target.square().sum())
    return energy if energy > 0.01 * damped else None


def _fit(
    target: Tensor,
    pull: Tensor | None,
    factored: FactoredHessian,
    error_weight: Tensor,
    settings: LayerSettings,
    loops: ColumnLoops,
) -> WeightFit:
    """Plain planes; ``pull`` is ``T H``, None without a refit."""
    fit = _forward_pass(target, factored, error_weight, settings, loops)
    if pull is not None:
        for sweep in range(settings.sweeps + 1):
            if sweep:
                with part("descent"):
                    descend_signs(fit, target, factored.hessian, loops.sweep)
            with part("refit"):
                refit_rows(fit, pull, factored.hessian)
    return fit


def _propagation(weight: Tensor, statistics: InputStatistics, settings: LayerSettings, name: str) -> float:
    """α: as set, or cross-validated; 0 where there is no dense stream, or only one sample to choose it by."""
    if not statistics.two_streams:
        return 0.0
    if settings.propagation is not None:
        return settings.propagation
    return 0.0 if statistics.half is None else cross_validated_alpha(weight, statistics, settings.damping, name)


def _error_weight(settings: LayerSettings, factored: FactoredHessian, significance: Significance | None) -> Tensor:
    """Error weight Λ² of the alternating fit, [in]; dead columns weigh nothing."""
    if significance is not None:
        weight = significance.map.square()
    elif settings.significance == "hessian":
        weight = factored.hessian.diagonal().clone()
    else:
        weight = torch.ones_like(factored.hessian.diagonal())
    return weight.masked_fill(factored.dead, 0.0)


def _forward_pass(
    target: Tensor, factored: FactoredHessian, error_weight: Tensor, settings: LayerSettings, loops: ColumnLoops
) -> WeightFit:
    """Fit block after block, each on what the error feedback of the earlier ones made of it."""
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
            fit = fit_block(block, weight[None], salient, settings)
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
