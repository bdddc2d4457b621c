"""Saliency of weights and the choice of salient columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def saliency(weight: Float[Tensor, "out in"], inverse_diagonal: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """``S[i,j] = W[i,j]² / ([H⁻¹]_jj)²`` (BiLLM's sensitivity, method.md section 2)."""
    return weight.square() / inverse_diagonal.square()


def salient_mask(column_saliency: Float[Tensor, " width"], count: int) -> Bool[Tensor, " width"]:
    """The ``count`` most salient columns of a block; ties go to the lower column so that runs repeat."""
    mask = torch.zeros_like(column_saliency, dtype=torch.bool)
    if count:
        order = torch.sort(column_saliency, descending=True, stable=True).indices
        mask[order[:count]] = True
    return mask
