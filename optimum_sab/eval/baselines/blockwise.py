"""What the binarization methods share: block after block, with the error of each passed on to the later ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.hessian import FactoredHessian
from optimum_sab.core.planes import block_bounds

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

BLOCK_SIZE = 128
# Columns of a block that the search considers. The papers' search goes to 50, and a tenth is what they report to have
# found; by the squared error of the weights alone, as here, one more column always helps.
MAX_SALIENT = 13
PERCENTILES = tuple(p / 100 for p in range(10, 91, 2))


def compensated(
    weight: Float[Tensor, "out in"],
    factored: FactoredHessian,
    quantize: Callable[[Tensor, slice], Tensor],
    block_size: int = BLOCK_SIZE,
) -> Float[Tensor, "out in"]:
    """Quantize block by block; a block's error over U's diagonal, times U, moves the later ones (GPTQ's rule by block).

    Args:
        weight: W.
        factored: the Hessian that compensates.
        quantize: (block, its columns) → the block's approximation.
        block_size: columns per block.
    """
    U = factored.inverse_factor
    rest = weight.masked_fill(factored.dead, 0.0)
    result = torch.empty_like(rest)
    for start, end in block_bounds(rest.shape[1], block_size):
        block = rest[:, start:end].clone()
        result[:, start:end] = quantize(block, slice(start, end))
        if end < rest.shape[1]:
            errors = (block - result[:, start:end]) / U.diagonal()[start:end]
            rest[:, end:] -= errors @ U[start:end, end:]
    return result


def masked_mean(values: Tensor, mask: Tensor) -> Float[Tensor, "out 1"]:
    """Mean of every row over the entries of the mask; 0 where a row has none."""
    return (values * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1.0)


def binarize(values: Tensor, mask: Tensor, centred: bool = False) -> Tensor:
    """``μ + α sign(w − μ)`` per row over the entries of the mask, 0 elsewhere; μ = 0 unless ``centred``."""
    mean = masked_mean(values, mask) if centred else torch.zeros_like(values[:, :1])
    rest = (values - mean) * mask
    scale = masked_mean(rest.abs(), mask)
    return (mean + scale * torch.where(rest >= 0, 1.0, -1.0)) * mask


def binarize_twice(values: Tensor, mask: Tensor, centred: bool = False) -> Tensor:
    """Second-order (residual) binarization: what the first plane leaves is binarized again."""
    first = binarize(values, mask, centred)
    return first + binarize(values - first, mask)


def split_by_magnitude(
    values: Tensor, part: Float[Tensor, "out width"], error: Callable[[Tensor, Tensor], Tensor]
) -> Float[Tensor, "out width"]:
    """The entries of ``part`` above the best of `PERCENTILES` of their magnitudes, as a mask of 0 and 1.

    Args:
        values: a block.
        part: mask of the entries to split.
        error: (lower mask, upper mask) → the error this split leaves, a scalar.
    """
    size = values.abs()
    ordered = size[part > 0].sort().values
    if not ordered.numel():
        return torch.zeros_like(part)
    best, chosen = None, torch.zeros_like(part)
    for percentile in PERCENTILES:
        cut = ordered[int(percentile * (ordered.numel() - 1))]
        upper = part * (size > cut)
        found = error(part - upper, upper)
        if best is None or bool(found < best):
            best, chosen = found, upper
    return chosen


def salient_columns(
    values: Float[Tensor, "out width"], column_saliency: Float[Tensor, " width"]
) -> Bool[Tensor, " width"]:
    """How many of the most salient columns carry a second plane: the number that leaves the least squared error."""
    width = values.shape[1]
    order = column_saliency.argsort(descending=True, stable=True)
    ones = torch.ones_like(values)
    best, chosen = None, torch.zeros(width, dtype=torch.bool, device=values.device)
    for count in range(1, min(MAX_SALIENT, width - 1) + 1):
        inside = torch.zeros(width, device=values.device)
        inside[order[:count]] = 1.0
        mask = ones * inside
        left = values - binarize_twice(values, mask) - binarize(values, ones - mask)
        found = left.square().sum()
        if best is None or bool(found < best):
            best, chosen = found, inside > 0
    return chosen
