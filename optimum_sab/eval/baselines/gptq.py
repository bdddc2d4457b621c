"""GPTQ with groups (2210.17323): round-to-nearest on a min–max grid per group, errors passed on column by column."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optimum_sab.core.hessian import InputStatistics, factor_hessian
from optimum_sab.eval.baselines.simulated import Simulated, Storage, checked

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def gptq(
    weight: Float[Tensor, "out in"],
    statistics: InputStatistics,
    bits: int = 2,
    group_size: int = 128,
    damping: float = 0.01,
) -> Simulated:
    """Quantize to ``bits`` with an fp16 scale and an fp16 offset per row and group (asymmetric, as usually run).

    Args:
        weight: W.
        statistics: the balanced Hessian is used.
        bits: 1 to 8.
        group_size: input columns per group.
        damping: as in GPTQ.
    """
    factored = factor_hessian(statistics.hessian, damping)
    U = factored.inverse_factor
    rest = checked(weight).masked_fill(factored.dead, 0.0).clone()
    result = torch.empty_like(rest)
    top = 2**bits - 1
    storage = Storage(*rest.shape)
    storage.codes(rest.numel(), bits)
    for start in range(0, rest.shape[1], group_size):
        end = min(start + group_size, rest.shape[1])
        storage.row_scales(2)
        block = rest[:, start:end].T.contiguous()
        low, high = block.amin(0).clamp_max(0.0), block.amax(0).clamp_min(0.0)
        scale = ((high - low) / top).clamp_min(1e-8).half().float()
        zero = torch.round(-low / scale)
        errors = torch.empty_like(block)
        for j in range(end - start):
            value = (torch.round(block[j] / scale) + zero).clamp(0, top) - zero
            value = value * scale
            result[:, start + j] = value
            errors[j] = (block[j] - value) / U[start + j, start + j]
            if j + 1 < end - start:
                block[j + 1 :].addr_(U[start + j, start + j + 1 : end], errors[j], alpha=-1.0)
        if end < rest.shape[1]:
            rest[:, end:] -= errors.T @ U[start:end, end:]
    return Simulated(result, storage.per_weight)
