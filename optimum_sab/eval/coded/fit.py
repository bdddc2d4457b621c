"""A weight in coded planes while it is fitted: stored bits, free planes, and the scales of all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.code import Code
from optimum_sab.core.planes import BinaryPlanes, WeightFit
from optimum_sab.core.refit import RIDGE, refit_row_scale
from optimum_sab.core.row_scale import round_column_scale, round_row_scale
from optimum_sab.core.settings import LayerSettings
from optimum_sab.eval.coded.search import Ends, Levels, search_bits

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, UInt8
    from torch import Tensor


@dataclass
class CodedFit:
    """Planes of a weight: those derived from the stored plane, free base planes, free residual planes.

    Attributes:
        stored: u, bool [out, in].
        free: ±1 fp32 [out, in] of the free planes, base planes first; 0 where a residual plane has no column.
        salient: bool [in].
        row_scale: a [planes, blocks, out], in the order derived, free.
        column_scale: c [in].
        settings: of the planes it comes out as: the derived ones count as base planes.
        code: how they are derived.
        tied: each derived plane has half the row scale of the one before it, and stores none.
    """

    stored: Bool[Tensor, "out in"]
    free: list[Float[Tensor, "out in"]]
    salient: Bool[Tensor, " in"]
    row_scale: Float[Tensor, "planes blocks out"]
    column_scale: Float[Tensor, " in"]
    settings: LayerSettings
    code: Code
    tied: bool = True

    @property
    def signs(self) -> list[Float[Tensor, "out in"]]:
        """All planes, ±1 or 0."""
        return [*self.code.planes(self.stored), *self.free]

    def dense(self) -> Float[Tensor, "out in"]:
        """The weight they stand for."""
        return self.column_scale * self.values()

    def values(self) -> Float[Tensor, "out in"]:
        """The same without column scales."""
        width = self.stored.shape[1]
        total = torch.zeros(self.stored.shape, dtype=torch.float32)
        for sign, scale in zip(self.signs, self.row_scale, strict=True):
            total.addcmul_(sign, scale.T.repeat_interleave(self.settings.block_size, dim=1)[:, :width])
        return total

    def levels(self) -> Levels:
        """What a search can choose from."""
        base = self.settings.base_planes - len(self.code.taps)
        free = base + self.settings.residual_planes * self.salient.int()
        block = torch.arange(self.salient.numel()) // self.settings.block_size
        return Levels(self.row_scale, self.column_scale, block, free)

    def put(self, bits: UInt8[Tensor, "out width"], start: int = 0) -> None:
        """Take over what a search found for the columns from ``start`` on."""
        end = start + bits.shape[1]
        self.stored[:, start:end] = (bits & 1).bool()
        base = self.settings.base_planes - len(self.code.taps)
        for f, plane in enumerate(self.free):
            sign = (bits >> (1 + f) & 1).float() * 2.0 - 1.0
            plane[:, start:end] = sign if f < base else sign * self.salient[start:end]

    def copy(self) -> CodedFit:
        """The same in other memory."""
        free = [plane.clone() for plane in self.free]
        return replace(self, stored=self.stored.clone(), free=free, row_scale=self.row_scale.clone())

    def take(self, other: CodedFit) -> None:
        """Become what another one is."""
        twin = other.copy()
        self.stored, self.free, self.row_scale, self.column_scale = (
            twin.stored,
            twin.free,
            twin.row_scale,
            twin.column_scale,
        )

    def planes(self) -> BinaryPlanes:
        """As planes of the present format, the derived ones written out."""
        return WeightFit(self.signs, self.salient, self.row_scale, self.column_scale, self.settings).planes()


def encode(fit: CodedFit, target: Float[Tensor, "out in"], inverse_factor: Float[Tensor, "in in"]) -> None:
    """Search all bits anew under the scales there are."""
    fit.put(search_bits(target, inverse_factor, fit.levels(), fit.code).bits)


def descend(
    fit: CodedFit,
    target: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    window: int,
    first: int = 0,
) -> None:
    """Search window after window anew, all other bits as they are; a row takes what lowers its error, so none rises.

    With error E outside, the window's columns aim at ``q + E H[:, w] H[w, w]⁻¹``, which is exact for any bits inside.
    The ``memory`` columns behind a window depend on its bits too: they belong to the search, their own bits fixed.

    Args:
        fit: changed in place.
        target: T.
        hessian: damped H.
        window: columns searched at a time.
        first: of them in the first window, where not as many: so that another sweep has its bounds elsewhere.
    """
    width, memory = target.shape[1], fit.code.memory
    dense = fit.dense()
    error = target - dense
    levels = fit.levels()
    bounds = [0, *range(first or window, width, window), width]
    for start, end in pairwise(bounds):
        stop = min(end + memory, width)
        local = hessian[start:stop, start:stop]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(local))
        wanted = dense[:, start:stop] + (error @ hessian[:, start:stop]) @ inverse
        before = torch.nn.functional.pad(fit.stored, (memory, 0))[:, start : start + memory]
        ends = Ends(before, fit.stored[:, end:stop])
        factor = torch.linalg.cholesky(inverse, upper=True)
        bits = search_bits(wanted, factor, levels.columns(start, stop), fit.code, ends).bits
        found = _between(fit, bits, before, start)
        old, new = wanted - dense[:, start:stop], wanted - found
        better = ((new @ local) * new).sum(1) < ((old @ local) * old).sum(1)
        kept = _bits(fit, start, stop)
        fit.put(torch.where(better[:, None], bits, kept), start)
        dense[:, start:stop] = torch.where(better[:, None], found, dense[:, start:stop])
        error[:, start:stop] = target[:, start:stop] - dense[:, start:stop]


def _bits(fit: CodedFit, start: int, end: int) -> Tensor:
    """What `CodedFit.put` would take, of what there is."""
    bits = fit.stored[:, start:end].to(torch.uint8)
    for f, plane in enumerate(fit.free):
        bits |= (plane[:, start:end] > 0).to(torch.uint8) << (1 + f)
    return bits


def _between(fit: CodedFit, bits: Tensor, before: Tensor, start: int) -> Tensor:
    """The weight [out, width] that found bits stand for, behind the stored bits ``before``."""
    width, memory = bits.shape[1], before.shape[1]
    end = start + width
    derived = fit.code.planes(torch.cat([before, (bits & 1).bool()], 1))
    base = fit.settings.base_planes - len(derived)
    planes = [plane[:, memory:] for plane in derived]
    for f in range(len(fit.free)):
        sign = (bits >> (1 + f) & 1).float() * 2.0 - 1.0
        planes.append(sign if f < base else sign * fit.salient[start:end])
    block = torch.arange(start, end) // fit.settings.block_size
    total = torch.zeros(bits.shape, dtype=torch.float32)
    for plane, scale in zip(planes, fit.row_scale, strict=True):
        total.addcmul_(plane, scale.T[:, block])
    return total * fit.column_scale[start:end]


def refit_rows(fit: CodedFit, target: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]) -> None:
    """Row scales of all planes by least squares under the full Hessian, as stored."""
    signs, derived = fit.signs, len(fit.code.taps)
    if fit.tied:
        halves = [0.5**q for q in range(derived)]
        together = torch.stack([part * sign for part, sign in zip(halves, signs[:derived], strict=True)]).sum(0)
        signs = [together, *signs[derived:]]
    found = refit_row_scale(signs, fit.column_scale, target @ hessian, hessian, fit.settings.block_size)
    found = round_row_scale(found, fit.settings.row_scale)
    fit.row_scale = torch.cat([*(found[:1] * part for part in halves), found[1:]]) if fit.tied else found


def refit_columns(fit: CodedFit, target: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]) -> None:
    """Column scales by least squares under the full Hessian: ``(H ⊙ VᵀV) c = diag(Vᵀ T H)``, as stored.

    The ridge draws them to what they are. Row scales take their mean in a block over; they are to be refitted next.
    """
    values = fit.values()
    gram = (values.T @ values) * hessian
    right = (values * (target @ hessian)).sum(0) - gram @ fit.column_scale
    diagonal = gram.diagonal()
    diagonal.add_(RIDGE * diagonal + diagonal.max() * 1e-8 + torch.finfo(torch.float32).tiny)
    found = fit.column_scale + torch.linalg.solve(gram, right)
    block = fit.settings.block_size
    for k, part in enumerate(found.split(block)):
        norm = part.abs().mean().clamp_min(torch.finfo(torch.float32).tiny)
        fit.row_scale[:, k] *= norm
        found[k * block : (k + 1) * block] = part / norm
    fit.column_scale = round_column_scale(found.masked_fill(fit.column_scale == 0, 0.0))
