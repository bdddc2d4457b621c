"""Binarize one weight: what its planes are to approximate, the fit, and the error that is left."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.code import NO_CODE
from optimum_sab.core.coded import START_ITERATIONS, coded_fit
from optimum_sab.core.columns import IN_TORCH, ColumnLoops
from optimum_sab.core.factorization import WIDE, FactoredHessian, factor_hessian, quadratic_form
from optimum_sab.core.fitting import fit_planes
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.magnitude import check_magnitude, extreme_power, times_power, with_outputs_scaled
from optimum_sab.core.parts import part
from optimum_sab.core.planes import BinaryPlanes, WeightFit
from optimum_sab.core.problem import Problem
from optimum_sab.core.row_scale import round_row_scale
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
    prepared = prepare(weight, statistics, settings, name)
    return finish(prepared, _fit(prepared.problem, settings, loops), settings)


@dataclass(frozen=True)
class Prepared:
    """A weight that is to be solved.

    Attributes:
        problem: what its planes are fitted to, divided by ``2^power``.
        hessian: H, undamped [in, in].
        added: what the damping has added to its diagonal.
        power: of two, by which an extreme weight is divided; 0 for others.
        significance: Λ and its parts, or None where the setting is not "modality".
        propagation: α.
        name: the module's, for messages.
    """

    problem: Problem
    hessian: Float[Tensor, "in in"]
    added: float
    power: int
    significance: Significance | None
    propagation: float
    name: str


def prepare(
    weight: Float[Tensor, "out in"], statistics: InputStatistics, settings: LayerSettings, name: str
) -> Prepared:
    """All of `solve` that comes before planes are fitted; same arguments and errors."""
    W = weight.detach().to(statistics.hessian.device, torch.float32)
    check_magnitude(W, settings.row_scale, name)
    power = extreme_power(W)
    if power:
        W, statistics = times_power(W, -power), with_outputs_scaled(statistics, -power)
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
    problem = Problem(target, factored.hessian, factored.inverse_factor, factored.dead, weight, pull)
    return Prepared(problem, statistics.hessian, factored.added, power, significance, alpha, name)


def finish(prepared: Prepared, fit: WeightFit, settings: LayerSettings) -> Solution:
    """All of `solve` that comes after planes are fitted.

    Args:
        prepared: the weight.
        fit: of its problem.
        settings: that both were made with.

    Raises:
        NonFiniteError: what was found is not finite.
    """
    planes, problem = fit.planes(), prepared.problem
    with part("errors"):
        some = _judged(*problem.target.shape)
        target = problem.target[some]
        energy = None if problem.pull is None else _energy(target, problem.pull[some], prepared.added)
        error = output_error(target, planes.rows(some).dequantize(), prepared.hessian, energy)
    if not math.isfinite(error):
        raise NonFiniteError(
            f"the planes found for {prepared.name} hold NaN or inf: its weights or inputs differ by too many powers of "
            f"ten; leave it dense with modules_to_not_convert={[prepared.name]!r}."
        )
    if prepared.power:
        scale = round_row_scale(times_power(planes.row_scale, prepared.power), settings.row_scale)
        planes = replace(planes, row_scale=scale)
    return Solution(planes, error, prepared.significance, prepared.propagation)


def _fit(problem: Problem, settings: LayerSettings, loops: ColumnLoops) -> WeightFit:
    if settings.code == NO_CODE:
        return fit_planes(problem, settings, loops)
    start = settings.replace(code=NO_CODE, sweeps=0, iterations=min(settings.iterations, START_ITERATIONS))
    return coded_fit(fit_planes(problem, start, loops), problem, settings, loops.search)


def _judged(out: int, width: int) -> slice:
    """The rows that an error is reported of: all, or where that is work, some, evenly spread."""
    return slice(None, None, max(1, out // JUDGED_ROWS) if width >= WIDE else 1)


def _energy(target: Tensor, pull: Tensor, added: float) -> float | None:
    """``tr(T H Tᵀ)`` of the undamped H by way of ``T H`` of the damped one; None where little of that is left."""
    damped = float((pull * target).sum())
    energy = damped - added * float(target.square().sum())
    return energy if energy > 0.01 * damped else None


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
