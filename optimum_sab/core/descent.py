"""Coordinate descent over the signs under the full Hessian, scales fixed (zero bits, lower error)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimum_sab.core.feedback import LevelPicker
from optimum_sab.core.planes import WeightFit, block_bounds

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class SweptBlock:
    """A block of columns while its signs descend, of one weight or of a stack of them.

    Attributes:
        fit: the weight's; ``fit.signs`` is changed in place.
        index: which of its blocks.
        gradient: ``E H`` of these columns, [..., out, width], contiguous; may be overwritten.
        value: Q, all columns, [..., out, in].
        error: ``E = T − Q``, all columns, [..., out, in]; those of the block are brought up to date.
        hessian: damped H [..., in, in].
    """

    fit: WeightFit
    index: int
    gradient: Float[Tensor, "... out width"]
    value: Float[Tensor, "... out in"]
    error: Float[Tensor, "... out in"]
    hessian: Float[Tensor, "... in in"]

    @property
    def bounds(self) -> tuple[int, int]:
        """``[start, end)`` of its columns."""
        return block_bounds(self.value.shape[-1], self.fit.settings.block_size)[self.index]

    def of(self, weight: int) -> SweptBlock:
        """The block of one weight of a stack; views."""
        parts = (each[weight] for each in (self.gradient, self.value, self.error, self.hessian))
        return SweptBlock(self.fit.of(weight), self.index, *parts)


def descend_signs(
    fit: WeightFit,
    target: Float[Tensor, "... out in"],
    hessian: Float[Tensor, "... in in"],
    sweep: Callable[[SweptBlock], None] | None = None,
) -> None:
    """One sweep over the columns; each takes the level that minimises ``(t − q) H (t − q)ᵀ`` given all others.

    With error ``E = T − Q`` and gradient ``G = E H`` the best real value of column j is ``q_j + G_j / H_jj``;
    the nearest level to it is the exact minimiser, so the error never rises. G is kept for one block of columns and
    brought up to date between blocks by one product. ``fit.signs`` is changed in place.

    Args:
        fit: planes, their signs chosen; of a stack of weights where ``sweep`` takes one.
        target: T.
        hessian: damped H.
        sweep: goes through one block; None for `sweep_block`.
    """
    value = fit.dequantize()
    error = target - value
    for k, (start, end) in enumerate(block_bounds(target.shape[-1], fit.settings.block_size)):
        gradient = error @ hessian[..., start:end]
        (sweep or sweep_block)(SweptBlock(fit, k, gradient, value, error, hessian))


def sweep_block(block: SweptBlock) -> None:
    """Go through the columns of one weight's block."""
    fit, (start, end) = block.fit, block.bounds
    picker = LevelPicker(fit.row_scale[:, block.index], fit.settings.base_planes)
    gradient = block.gradient.T.contiguous()  # [width, out]
    current = block.value[:, start:end].T.contiguous()
    local = block.hessian[start:end, start:end]
    diagonal, salient = local.diagonal().tolist(), fit.salient[start:end].tolist()
    before = current.clone()
    for j in range(end - start):
        wanted = current[j] + gradient[j] / diagonal[j]
        chosen, new = picker.pick(wanted, fit.column_scale[start + j], salient[j])
        for p in range(chosen.shape[0]):
            fit.signs[p][:, start + j] = chosen[p]
        change = current[j] - new  # error grows by this
        current[j] = new
        if j + 1 < end - start:
            gradient[j + 1 :].addr_(local[j, j + 1 :], change)
    block.error[:, start:end] += (before - current).T
