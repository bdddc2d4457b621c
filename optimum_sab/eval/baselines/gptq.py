"""GPTQ with groups (2210.17323): round-to-nearest on a min–max grid per group, errors passed on column by column."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.hessian import InputStatistics
from optimum_sab.errors import ConfigError
from optimum_sab.eval.baselines.blockwise import compensated_by_column
from optimum_sab.eval.baselines.simulated import Simulated, Storage, checked, fp16_step

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
        damping: share of the Hessian's mean diagonal added to it.

    Raises:
        ConfigError: ``bits`` is not 1 to 8.
        NonFiniteError: the weight or the Hessian holds NaN or inf.
    """
    if not 1 <= bits <= 8:
        raise ConfigError(f"bits={bits} must be 1 to 8; 2, 3 and 4 are the usual ones.")
    W = checked(weight)
    factored = statistics.factored(damping)
    top = 2**bits - 1
    storage = Storage(*W.shape)
    storage.codes(W.numel(), bits)

    def open_block(block: Tensor, columns: slice) -> Callable[[Tensor, int], Tensor]:
        storage.row_scales(2)
        low, high = block.amin(1).clamp_max(0.0), block.amax(1).clamp_min(0.0)
        scale = fp16_step((high - low) / top)
        zero = torch.round(-low / scale)

        def quantize(column: Tensor, place: int) -> Tensor:
            return ((torch.round(column / scale) + zero).clamp(0, top) - zero) * scale

        return quantize

    result = compensated_by_column(W, factored, open_block, group_size)
    return Simulated(result, storage.per_weight)
