"""Round to nearest with one bit: the sign, and the mean magnitude of a row in a block. No calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.planes import block_bounds
from optimum_sab.eval.baselines.blockwise import BLOCK_SIZE, binarize
from optimum_sab.eval.baselines.simulated import Simulated, Storage, checked

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def rtn_sign(weight: Float[Tensor, "out in"], statistics: InputStatistics, block_size: int = BLOCK_SIZE) -> Simulated:
    """``α sign(w)`` with ``α = mean |w|``, the least-squares scale. Bits: 1 + 16/block_size."""
    W = checked(weight)
    storage = Storage(*W.shape)
    result = torch.empty_like(W)
    for start, end in block_bounds(W.shape[1], block_size):
        block = W[:, start:end]
        result[:, start:end] = binarize(block, torch.ones_like(block, dtype=torch.bool))
        storage.signs(end - start)
        storage.row_scales(1)
    return Simulated(result, storage.per_weight)
