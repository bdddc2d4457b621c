"""PB-LLM (2310.00034): some salient weights at eight bits, wherever they stand, and the sign of the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.planes import sign_of
from optimum_sab.core.saliency import saliency
from optimum_sab.errors import ConfigError
from optimum_sab.eval.baselines.blockwise import BLOCK_SIZE, compensated_by_column, masked_mean
from optimum_sab.eval.baselines.simulated import Simulated, Storage, checked, fp16_step

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SALIENT_BITS = 8


def pb_llm(
    weight: Float[Tensor, "out in"],
    statistics: InputStatistics,
    salient_share: float = 0.1,
    damping: float = 0.01,
) -> Simulated:
    """Partial binarization without training, with GPTQ's compensation column by column.

    Salient are the largest ``w²/[H⁻¹]_jj²`` of the layer; they take a min–max grid of 8 bits per row. The others become
    ``α sign(w)``, ``α = mean |w|`` over a row's others in a block when that is reached. Bits with a share s: 1 of mask
    per weight, 8 per salient and 1 per other weight, an fp16 scale per row and block, two fp16 numbers per row:

        ``2 + 7 s + 16/128 + 32/in`` bits per weight

    Args:
        weight: W.
        statistics: the balanced Hessian is used.
        salient_share: share of the weights at 8 bits.
        damping: share of the Hessian's mean diagonal added to it.

    Raises:
        ConfigError: ``salient_share`` is not in (0, 1).
        NonFiniteError: the weight or the Hessian holds NaN or inf.
    """
    if not 0.0 < salient_share < 1.0:
        raise ConfigError(f"salient_share={salient_share} must lie in (0, 1); 0.1 is the usual value.")
    W = checked(weight)
    factored = statistics.factored(damping)
    score = saliency(W, factored.inverse_diagonal).masked_fill(factored.dead, 0.0)
    count = max(1, round(salient_share * W.numel()))
    salient = torch.zeros(W.numel(), dtype=torch.bool, device=W.device)
    salient[score.flatten().topk(count).indices] = True
    salient = salient.view_as(W)
    top = 2**SALIENT_BITS - 1
    low, high = (W * salient).amin(1).half().float(), (W * salient).amax(1)
    step = fp16_step((high - low) / top)
    storage = Storage(*W.shape)
    storage.bitmap(W.shape[1])
    storage.codes(count, SALIENT_BITS)
    storage.codes(W.numel() - count, 1)
    storage.row_scales(2)

    def open_block(block: Tensor, columns: slice) -> Callable[[Tensor, int], Tensor]:
        storage.row_scales(1)
        inside = salient[:, columns].T.contiguous()
        scale = masked_mean(block.abs(), ~salient[:, columns])[:, 0]

        def quantize(column: Tensor, place: int) -> Tensor:
            grid = low + ((column - low) / step).round().clamp(0, top) * step
            return torch.where(inside[place], grid, scale * sign_of(column))

        return quantize

    return Simulated(compensated_by_column(W, factored, open_block, BLOCK_SIZE), storage.per_weight)
