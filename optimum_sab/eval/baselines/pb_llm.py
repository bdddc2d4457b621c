"""PB-LLM (2310.00034): some salient weights at eight bits, wherever they stand, and the sign of the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optimum_sab.core.hessian import InputStatistics, factor_hessian
from optimum_sab.core.saliency import saliency
from optimum_sab.errors import ConfigError
from optimum_sab.eval.baselines.blockwise import BLOCK_SIZE, binarize, compensated
from optimum_sab.eval.baselines.simulated import Simulated, Storage, checked

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
    """Partial binarization without training, compensated between blocks.

    Salient are the largest ``w²/[H⁻¹]_jj²`` of the layer; they take a min–max grid of 8 bits per row. Bits: 1 of mask
    per weight, 8 per salient and 1 per other weight, an fp16 scale per row and block, two fp16 numbers per row.

    Raises:
        ConfigError: ``salient_share`` is not in (0, 1).
    """
    if not 0.0 < salient_share < 1.0:
        raise ConfigError(f"salient_share={salient_share} must lie in (0, 1); 0.1 is the usual value.")
    W = checked(weight)
    factored = factor_hessian(statistics.hessian, damping)
    score = saliency(W, factored.inverse.diagonal())
    count = max(1, round(salient_share * W.numel()))
    mask = torch.zeros_like(W).flatten()
    mask[score.flatten().topk(count).indices] = 1.0
    mask = mask.view_as(W)
    low = torch.where(mask > 0, W, torch.zeros_like(W)).amin(1, keepdim=True)
    high = torch.where(mask > 0, W, torch.zeros_like(W)).amax(1, keepdim=True)
    step = ((high - low) / (2**SALIENT_BITS - 1)).clamp_min(1e-8).half().float()
    low = low.half().float()

    def quantize(block: Tensor, columns: slice) -> Tensor:
        inside = mask[:, columns]
        codes = ((block - low) / step).round().clamp(0, 2**SALIENT_BITS - 1)
        return inside * (low + codes * step) + binarize(block, 1.0 - inside)

    storage = Storage(*W.shape)
    storage.bitmap(W.shape[1])
    storage.codes(count, SALIENT_BITS)
    storage.codes(W.numel() - count, 1)
    storage.row_scales(-(-W.shape[1] // BLOCK_SIZE) + 2)
    return Simulated(compensated(W, factored, quantize), storage.per_weight)
