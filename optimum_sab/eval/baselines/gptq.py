"""GPTQ with groups (2210.17323): round-to-nearest on a min–max grid per group, errors passed on column by column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.hessian import factor_hessian

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Simulated:
    """A baseline's result: the dense weight it stands for, and the bits per weight its storage would take."""

    weight: Tensor
    bits_per_weight: float


def gptq(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    bits: int = 2,
    group_size: int = 128,
    damping: float = 0.01,
) -> Simulated:
    """Quantize to ``bits`` with an fp16 scale and an fp16 offset per row and group (asymmetric, as usually run).

    Args:
        weight: W.
        hessian: undamped H.
        bits: 1 to 8.
        group_size: input columns per group.
        damping: as in GPTQ.
    """
    factored = factor_hessian(hessian, damping)
    U = factored.inverse_factor
    rest = weight.float().masked_fill(factored.dead, 0.0).clone()
    result = torch.empty_like(rest)
    top = 2**bits - 1
    groups = 0
    for start in range(0, rest.shape[1], group_size):
        end = min(start + group_size, rest.shape[1])
        groups += 1
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
    return Simulated(result, bits + 32.0 * groups / rest.shape[1])
