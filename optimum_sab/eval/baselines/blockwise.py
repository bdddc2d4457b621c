"""What the methods share: a block's error passed on to the later ones, and binarization to first and second order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.factorization import FactoredHessian
from optimum_sab.core.planes import block_bounds, sign_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

BLOCK_SIZE = 128


def compensated(
    weight: Float[Tensor, "out in"],
    factored: FactoredHessian,
    quantize: Callable[[Tensor, slice], Tensor],
    block_size: int = BLOCK_SIZE,
) -> Float[Tensor, "out in"]:
    """Quantize block by block, each whole: ``E_ij = (W − Q)_ij / U_jj``, and ``E U`` leaves the later blocks.

    This is the compensation of BiLLM and what follows it. It drops U's off-diagonals inside the block.

    Args:
        weight: W.
        factored: the Hessian that compensates, ``Uᵀ U = H⁻¹``.
        quantize: (block [out, width], its columns) → the block's approximation.
        block_size: columns per block.
    """
    U = factored.inverse_factor
    rest = weight.masked_fill(factored.dead, 0.0)
    result = torch.empty_like(rest)
    for start, end in block_bounds(rest.shape[1], block_size):
        block = rest[:, start:end].clone()
        result[:, start:end] = quantize(block, slice(start, end))
        errors = (block - result[:, start:end]) / U.diagonal()[start:end]
        rest[:, end:] -= errors @ U[start:end, end:]
    return result


def compensated_by_column(
    weight: Float[Tensor, "out in"],
    factored: FactoredHessian,
    open_block: Callable[[Tensor, slice], Callable[[Tensor, int], Tensor]],
    block_size: int = BLOCK_SIZE,
) -> Float[Tensor, "out in"]:
    """Quantize column by column (2210.17323): what column j leaves, over ``U_jj``, moves all later columns by ``U_j:``.

    Args:
        weight: W.
        factored: the Hessian that compensates, ``Uᵀ U = H⁻¹``.
        open_block: (block [out, width], its columns) → the block's quantizer, (column [out], its place in the block) →
            the column's approximation. Grids are fixed when a block is reached.
        block_size: columns per block.
    """
    U = factored.inverse_factor
    rest = weight.masked_fill(factored.dead, 0.0)
    result = torch.empty_like(rest)
    for start, end in block_bounds(rest.shape[1], block_size):
        quantize = open_block(rest[:, start:end], slice(start, end))
        columns = rest[:, start:end].T.contiguous()  # a column at a time is read and written
        errors = torch.empty_like(columns)
        for j in range(end - start):
            value = quantize(columns[j], j)
            result[:, start + j] = value
            errors[j] = (columns[j] - value) / U[start + j, start + j]
            columns[j + 1 :].addr_(U[start + j, start + j + 1 : end], errors[j], alpha=-1.0)
        rest[:, end:] -= errors.T @ U[start:end, end:]
    return result


def masked_mean(values: Float[Tensor, "out width"], mask: Tensor) -> Float[Tensor, "out 1"]:
    """Mean of every row over the entries of the mask; 0 where a row has none."""
    return (values * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)


def binarize(values: Float[Tensor, "out width"], mask: Tensor, centred: bool = False) -> Float[Tensor, "out width"]:
    """``μ + α sign(w − μ)``, ``α = mean |w − μ|``, per row over the entries of the mask, 0 elsewhere.

    Args:
        values: W.
        mask: which entries take part, bool [out, width].
        centred: μ is the row's mean; else 0.
    """
    mean = masked_mean(values, mask) if centred else torch.zeros_like(values[:, :1])
    rest = (values - mean) * mask
    return (mean + masked_mean(rest.abs(), mask) * sign_of(rest)) * mask


def binarize_twice(
    values: Float[Tensor, "out width"], mask: Tensor, centred: bool = False
) -> Float[Tensor, "out width"]:
    """Second-order (residual) binarization: what the first plane leaves is binarized again.

    The two means add up to one number, so centring costs one per row here too.
    """
    first = binarize(values, mask, centred)
    return first + binarize(values - first, mask, centred)
