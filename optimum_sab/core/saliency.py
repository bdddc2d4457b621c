"""Saliency of weights and the choice of salient columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def saliency(weight: Float[Tensor, "... out in"], divisor: Float[Tensor, "... in"]) -> Float[Tensor, "... out in"]:
    """``S[i,j] = W[i,j]² / d_j²`` (BiLLM's sensitivity, docs/method.md).

    Args:
        weight: W.
        divisor: d. ``[H⁻¹]_jj`` as it is written in the papers; where columns are chosen during the error feedback, the
            diagonal of U with ``UᵀU = H⁻¹``, as their code has it: ``W²/U_jj²`` is what the output loses,
            ``w H wᵀ``, when the weight goes and the columns after it make up for it.
    """
    return weight.square() / divisor.square()[..., None, :]


def salient_mask(column_saliency: Float[Tensor, "... width"], count: int) -> Bool[Tensor, "... width"]:
    """The ``count`` most salient columns of a block; ties go to the lower column so that runs repeat."""
    mask = torch.zeros_like(column_saliency, dtype=torch.bool)
    if count:
        order = torch.sort(column_saliency, descending=True, stable=True).indices
        mask.scatter_(-1, order[..., :count], True)
    return mask
