"""Coded planes for one weight, in the place of `optimum_sab.core.solver.solve`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.code import Code, find_code
from optimum_sab.core.hessian import FactoredHessian, InputStatistics
from optimum_sab.core.planes import BinaryPlanes, block_bounds
from optimum_sab.core.row_scale import round_row_scale
from optimum_sab.core.settings import MAX_PLANES, LayerSettings
from optimum_sab.core.solver import Solution, output_error, solve
from optimum_sab.core.target import target_of
from optimum_sab.errors import ConfigError
from optimum_sab.eval.coded.fit import CodedFit, descend, encode, refit_columns, refit_rows
from optimum_sab.format.layout import stored_bits_per_weight

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

START = (1.0, 0.5, 0.25)  # scales of the derived planes to begin with, of a lone plane's
START_BEHIND = (0.5, 0.25, 0.125)  # behind a free plane: of its scale
PAYS = 0.004  # of the error: steps that take off less are the last
START_ITERATIONS = 4


@dataclass(frozen=True)
class Coding:
    """How coded planes are found.

    Args:
        code: a name for `find_code`.
        rounds: searches of all bits, each followed by a refit of the scales.
        descents: sweeps over windows of columns afterwards, at most.
        window: columns of a window.
        columns: refit column scales too.
        tied: each derived plane has half the row scale of the one before it; else each has its own, which is stored.

    Raises:
        ConfigError: the code is unknown, or a number out of range.
    """

    code: str | int = "16"
    rounds: int = 1
    descents: int = 4
    window: int = 96
    columns: bool = True
    tied: bool = True

    def __post_init__(self) -> None:
        find_code(str(self.code))
        for name, least in (("rounds", 1), ("descents", 0), ("window", 8)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r} must be an integer of at least {least}.")

    @property
    def found(self) -> Code:
        """The code of that name."""
        return find_code(str(self.code))

    def expanded(self, settings: LayerSettings) -> LayerSettings | None:
        """Settings of the planes that a layer comes out as, the first base plane in the place of which the derived
        planes stand; None where that is more planes than there may be: such a layer is not coded."""
        more = len(self.found.taps) - 1
        return (
            None if settings.planes + more > MAX_PLANES else settings.replace(base_planes=settings.base_planes + more)
        )

    def bits_per_weight(self, out_features: int, in_features: int, settings: LayerSettings) -> float:
        """Stored bits: of the stored planes, and of every row scale that is not half another one."""
        expanded = self.expanded(settings)
        if expanded is None:
            return stored_bits_per_weight(out_features, in_features, settings)
        unwritten = expanded.base_planes - settings.base_planes
        plane = 32 * -(-in_features // 32) / in_features
        written = stored_bits_per_weight(out_features, in_features, expanded) - unwritten * plane
        if not self.tied:
            return written
        scales = 8 if settings.row_scale == "fp8" else 16
        return written - unwritten * scales * len(block_bounds(in_features, settings.block_size)) / in_features


def solve_coded(
    weight: Float[Tensor, "out in"],
    statistics: InputStatistics,
    settings: LayerSettings,
    coding: Coding,
    name: str = "the layer",
) -> Solution:
    """Binarize ``weight`` with its first base plane coded.

    Salient columns, column scales and α are those of plain planes without descent; what is aimed at is the same.

    Args:
        weight: W, of ordinary magnitude.
        statistics: the inputs' second moments.
        settings: of plain planes: as many stored bits as these, but for the row scales of the derived planes.
        coding: see `Coding`.
        name: the module's name, for messages.

    Returns:
        The derived planes written out as base planes (`Coding.expanded`). Plain planes where there would be too many.
    """
    expanded = coding.expanded(settings)
    if expanded is None:
        return solve(weight, statistics, settings, name)
    plain = solve(
        weight, statistics, settings.replace(sweeps=0, iterations=min(settings.iterations, START_ITERATIONS)), name
    )
    factored = statistics.factored(settings.damping, name)
    target = target_of(weight.detach().float(), statistics, factored, plain.propagation)
    fit = begin(plain.planes, expanded, coding.found)
    fit.tied = coding.tied
    improve(fit, target, factored, coding)
    planes = fit.planes()
    return replace(plain, planes=planes, error=output_error(target, planes.dequantize(), statistics.hessian))


def improve(fit: CodedFit, target: Float[Tensor, "out in"], factored: FactoredHessian, coding: Coding) -> float:
    """Search and refit until it pays no more; the relative error that is left, under the damped Hessian.

    A step that makes the error larger, which a new search and the rounding of scales can, is taken back.
    """
    hessian, least, best = factored.hessian, float("inf"), fit.copy()
    for steps in ("rounds", "descents"):
        for step in range(getattr(coding, steps)):
            if steps == "rounds":
                encode(fit, target, factored.inverse_factor)
            else:
                descend(fit, target, hessian, coding.window, coding.window // 2 * (step % 2))
            if coding.columns and least < float("inf"):
                refit_columns(fit, target, hessian)
            refit_rows(fit, target, hessian)
            error = output_error(target, fit.dense(), hessian)
            pays = error < (1.0 - PAYS) * least
            if error < least:
                least, best = error, fit.copy()
            if not pays:
                break
        fit.take(best)
    return least


def begin(planes: BinaryPlanes, settings: LayerSettings, code: Code) -> CodedFit:
    """The scales to begin with, from those of plain planes; no bits yet."""
    stored = planes.base_sign.shape[0]
    first, others = planes.row_scale[:1], planes.row_scale[1:]
    if stored == 1:
        scale = torch.cat([first * part for part in START[: len(code.taps)]] + [others * 0.9])
    else:
        behind = [first * part for part in START_BEHIND[: len(code.taps)]]
        scale = torch.cat([*behind, first, others[: stored - 2] * 0.25, others[stored - 1 :] * 0.6])
    shape = planes.base_sign.shape[1:]
    salient = torch.zeros(shape[1], dtype=torch.bool)
    salient[planes.residual_index] = True
    count = stored - 1 + planes.residual_sign.shape[0]
    return CodedFit(
        torch.zeros(shape, dtype=torch.bool),
        [torch.zeros(shape) for _ in range(count)],
        salient,
        round_row_scale(scale, settings.row_scale),
        planes.column_scale,
        settings,
        code,
    )
