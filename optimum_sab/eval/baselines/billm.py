"""BiLLM (2402.04291): two planes on salient columns, two magnitude groups elsewhere, compensated between blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.saliency import saliency
from optimum_sab.eval.baselines.blockwise import binarize, binarize_twice, compensated
from optimum_sab.eval.baselines.simulated import Simulated, Storage, checked
from optimum_sab.eval.baselines.split import salient_columns, split_by_magnitude

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def billm(weight: Float[Tensor, "out in"], statistics: InputStatistics, damping: float = 0.01) -> Simulated:
    """Structural salient columns by summed saliency, their number searched; the break point of the rest searched.

    Every binarization is ``μ + α sign(w − μ)``. Bits per block with c salient columns: the signs, a second sign on
    salient columns, one bit of group per other weight, one bit per column, and seven fp16 numbers per row: (μ, α) of
    either group, (μ, α₁, α₂) of the salient columns:

        ``2 + 7·16/128 + 1/out`` bits per weight

    Args:
        weight: W.
        statistics: the balanced Hessian compensates.
        damping: share of the Hessian's mean diagonal added to it.

    Raises:
        NonFiniteError: the weight or the Hessian holds NaN or inf.
    """
    W = checked(weight)
    factored = statistics.factored(damping)
    diagonal = factored.inverse_factor.diagonal()
    storage = Storage(*W.shape)

    def quantize(block: Tensor, columns: slice) -> Tensor:
        salient = salient_columns(saliency(block, diagonal[columns]))
        width, count = block.shape[1], int(salient.sum())
        storage.signs(width)
        storage.signs(count)
        storage.bitmap(width - count)
        storage.column_bitmap(width)
        storage.row_scales(7)
        dense, rest = block[:, salient], block[:, ~salient]
        upper = split_by_magnitude(rest)
        result = torch.empty_like(block)
        result[:, salient] = binarize_twice(dense, torch.ones_like(dense, dtype=torch.bool), centred=True)
        result[:, ~salient] = binarize(rest, ~upper, centred=True) + binarize(rest, upper, centred=True)
        return result

    return Simulated(compensated(W, factored, quantize), storage.per_weight)
