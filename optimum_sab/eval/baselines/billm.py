"""BiLLM (2402.04291): two planes on salient columns, two magnitude groups elsewhere, compensated between blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optimum_sab.core.hessian import InputStatistics, factor_hessian
from optimum_sab.core.saliency import saliency
from optimum_sab.eval.baselines.blockwise import (
    binarize,
    binarize_twice,
    compensated,
    salient_columns,
    split_by_magnitude,
)
from optimum_sab.eval.baselines.simulated import Simulated, Storage, checked

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def billm(weight: Float[Tensor, "out in"], statistics: InputStatistics, damping: float = 0.01) -> Simulated:
    """Structural salient columns by summed saliency, their number searched; the break point of the rest searched.

    Every binarization is ``μ + α sign(w − μ)``. Bits per block: the signs, a second sign on salient columns, one bit of
    group per other weight, one bit per column, and seven fp16 numbers per row: (μ, α) of either group, (μ, α₁, α₂) of
    the salient columns.
    """
    W = checked(weight)
    factored = factor_hessian(statistics.hessian, damping)
    diagonal = factored.inverse_factor.diagonal()
    storage = Storage(*W.shape)

    def quantize(block: Tensor, columns: slice) -> Tensor:
        salient = salient_columns(block, saliency(block, diagonal[columns]).sum(0))
        inside = torch.ones_like(block) * salient
        rest = 1.0 - inside

        def error(lower: Tensor, upper: Tensor) -> Tensor:
            left = rest * block - binarize(block, lower, centred=True) - binarize(block, upper, centred=True)
            return left.square().sum()

        upper = split_by_magnitude(block, rest, error)
        width, count = block.shape[1], int(salient.sum())
        storage.signs(width)
        storage.signs(count)
        storage.bitmap(width - count)
        storage.column_bitmap(width)
        storage.row_scales(7)
        return (
            binarize_twice(block, inside, centred=True)
            + binarize(block, rest - upper, centred=True)
            + binarize(block, upper, centred=True)
        )

    result = compensated(W, factored, quantize)
    return Simulated(result, storage.per_weight)
