"""A coded plane is found: trellis searches over all columns, then over windows of them, with refits in between."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.code import TRELLIS16, TRELLIS16X2, Code, find_code
from optimum_sab.core.parts import part
from optimum_sab.core.planes import WeightFit
from optimum_sab.core.problem import Problem
from optimum_sab.core.refit import refit_columns, refit_rows
from optimum_sab.core.row_scale import round_row_scale
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.trellis import Ends, Levels, Search

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, UInt8
    from torch import Tensor

WINDOW = 96  # columns of a window
DESCENTS = 2  # for each of the settings' sweeps, at most
PAYS = 0.004  # of the error: a step that takes off less is the last
START_ITERATIONS = 4  # of the plain fit, whose salient columns and scales are the start
# Scales to begin with, as parts of those of plain planes (docs/benchmarks.md): of the coded plane alone, and of the
# residual planes then; of the coded plane beside a free one, of that one, both of the first plain plane's, and of the
# residual planes then; of further base planes, of their own.
ALONE, RESIDUAL_ALONE = 0.9, 1.0
BESIDE = {TRELLIS16.name: (0.7, 0.9, 0.9), TRELLIS16X2.name: (0.85, 0.7, 1.05)}  # coded, free, residual
FURTHER = 0.25


def coded_fit(
    plain: WeightFit,
    problem: Problem,
    settings: LayerSettings,
    search: Search,
) -> WeightFit:
    """The same columns and scales, with the first base plane coded, and all bits searched.

    One search of all bits, and windows searched anew as long as that pays, each followed by refits of column scales
    (but for the first time) and row scales under the full Hessian.

    Args:
        plain: a fit of plain planes, row scales refitted.
        problem: of one weight.
        settings: with a code.
        search: `search_bits`, or what gives the same.
    """
    code = find_code(settings.code)
    target, pull, hessian = problem.target, problem.pull, problem.hessian
    assert code is not None and pull is not None
    fit = _begin(plain, settings)
    best, least = fit, float("inf")
    for step in range(1 + DESCENTS * settings.sweeps):
        with part("descent" if step else "feedback"):
            if step:
                _search_windows(fit, code, target, hessian, WINDOW // 2 * (step % 2), search)
            else:
                _put(fit, code, search(target, problem.inverse_factor, _levels(fit), code))
        with part("refit"):
            if step:
                refit_columns(fit, pull, hessian)
            refit_rows(fit, pull, hessian)
        with part("errors"):
            error = float(_error(fit, target, hessian))
        if error < least:
            pays, best, least = error < (1.0 - PAYS) * least, _copy(fit), error
        else:
            pays = False
        if not pays:
            break
    return best


def _begin(plain: WeightFit, settings: LayerSettings) -> WeightFit:
    """The scales to begin with; no bits yet."""
    base, scale = settings.base_planes, plain.row_scale
    if base == 1:
        scale = torch.cat([scale[:1] * ALONE, scale[1:] * RESIDUAL_ALONE])
    else:
        coded, free, residual = BESIDE[settings.code]
        scale = torch.cat([scale[:1] * coded, scale[:1] * free, scale[1 : base - 1] * FURTHER, scale[base:] * residual])
    signs = [torch.zeros_like(sign) for sign in plain.signs]
    stored = torch.zeros_like(plain.signs[0], dtype=torch.bool)
    scale = round_row_scale(scale, settings.row_scale)
    return WeightFit(signs, plain.salient, scale, plain.column_scale, settings, stored)


def _copy(fit: WeightFit) -> WeightFit:
    stored = None if fit.stored is None else fit.stored.clone()
    signs = [sign.clone() for sign in fit.signs]
    return WeightFit(signs, fit.salient, fit.row_scale.clone(), fit.column_scale, fit.settings, stored)


def _error(fit: WeightFit, target: Tensor, hessian: Tensor) -> Tensor:
    difference = target - fit.dequantize()
    return ((difference @ hessian) * difference).sum()


def _levels(fit: WeightFit) -> Levels:
    """What a search can choose from."""
    free = fit.settings.base_planes - 1 + fit.settings.residual_planes * fit.salient.int()
    block = torch.arange(fit.salient.numel(), device=free.device) // fit.settings.block_size
    return Levels(fit.row_scale, fit.column_scale, block, free)


def _put(fit: WeightFit, code: Code, bits: UInt8[Tensor, "out width"], start: int = 0) -> None:
    """Take over what a search found for the columns from ``start`` on."""
    assert fit.stored is not None
    end = start + bits.shape[1]
    fit.stored[:, start:end] = (bits & 1).bool()
    for p, plane in enumerate(_free_planes(fit, bits, slice(start, end)), 1):
        fit.signs[p][:, start:end] = plane
    first, stop = max(0, start - code.memory), min(end + code.memory, fit.stored.shape[1])
    fit.signs[0][:, start:stop] = coded_values(code, fit.stored[:, first:stop])[:, start - first :]


def coded_values(code: Code, stored: Bool[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """What a coded plane stands for: ``P_1 + P_2 / 2``."""
    total = torch.zeros(stored.shape, device=stored.device)
    for plane, share in zip(code.planes(stored), code.parts, strict=True):
        total.add_(plane.float().mul_(2.0 * share).sub_(share))
    return total


def _free_planes(fit: WeightFit, bits: Tensor, columns: slice) -> list[Tensor]:
    """Signs of the planes beside the coded one, ±1 or 0, of found bits of these columns."""
    base, found = fit.settings.base_planes, []
    for p in range(1, fit.settings.planes):
        sign = (bits >> p & 1).float() * 2.0 - 1.0
        found.append(sign if p < base else sign * fit.salient[columns])
    return found


def _search_windows(fit: WeightFit, code: Code, target: Tensor, hessian: Tensor, first: int, search: Search) -> None:
    """Search window after window anew, all other bits as they are; a row takes what lowers its error, so none rises.

    With error E outside, the window's columns aim at ``q + E H[:, w] H[w, w]⁻¹``, which is exact for any bits inside.
    The ``memory`` columns behind a window depend on its bits too: they belong to the search, their own bits fixed.

    Args:
        fit: changed in place.
        code: of its first plane.
        target: T.
        hessian: damped H.
        first: columns of the first window, where not as many as of others, so that another sweep has its bounds
            elsewhere; else 0.
        search: of bits.
    """
    assert fit.stored is not None
    width, memory = target.shape[1], code.memory
    dense = fit.dequantize()
    error = target - dense
    levels = _levels(fit)
    bounds = [0, *range(first or WINDOW, width, WINDOW), width]
    for start, end in pairwise(bounds):
        stop = min(end + memory, width)
        inside = slice(start, stop)
        local = hessian[inside, inside]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(local))
        wanted = dense[:, inside] + (error @ hessian[:, inside]) @ inverse
        before = fit.stored[:, max(0, start - memory) : start]
        before = torch.nn.functional.pad(before, (memory - before.shape[1], 0))
        ends = Ends(before, fit.stored[:, end:stop])
        factor = torch.linalg.cholesky(inverse, upper=True)
        bits = search(wanted, factor, levels.columns(start, stop), code, ends)
        found = _weight_of(fit, code, bits, before, inside)
        old, new = wanted - dense[:, inside], wanted - found
        better = ((new @ local) * new).sum(1) < ((old @ local) * old).sum(1)
        _put(fit, code, torch.where(better[:, None], bits, _bits(fit, inside)), start)
        dense[:, inside] = torch.where(better[:, None], found, dense[:, inside])
        error[:, inside] = target[:, inside] - dense[:, inside]


def _bits(fit: WeightFit, columns: slice) -> Tensor:
    """What `_put` would take, of what there is."""
    assert fit.stored is not None
    bits = fit.stored[:, columns].to(torch.uint8)
    for p in range(1, fit.settings.planes):
        bits |= (fit.signs[p][:, columns] > 0).to(torch.uint8) << p
    return bits


def _weight_of(fit: WeightFit, code: Code, bits: Tensor, before: Tensor, columns: slice) -> Tensor:
    """The weight [out, width] that found bits of these columns stand for, behind the stored bits ``before``."""
    coded = coded_values(code, torch.cat([before, (bits & 1).bool()], 1))[:, before.shape[1] :]
    block = torch.arange(columns.start, columns.stop, device=bits.device) // fit.settings.block_size
    total = torch.zeros_like(coded)
    for plane, scale in zip([coded, *_free_planes(fit, bits, columns)], fit.row_scale, strict=True):
        total.addcmul_(plane, scale.T[:, block])
    return total * fit.column_scale[columns]
