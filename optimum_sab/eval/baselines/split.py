"""The lineage's two searches: which columns of a block are salient, and where magnitudes are split in two groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optimum_sab.core.saliency import salient_mask
from optimum_sab.eval.baselines.blockwise import binarize_twice

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

SALIENT_LIMIT = 50  # columns of a block, of which fewer than these may be salient
PERCENTILES = tuple(p / 100 for p in range(10, 91))


def salient_columns(saliencies: Float[Tensor, "out width"], limit: int = SALIENT_LIMIT) -> Bool[Tensor, " width"]:
    """How many of the columns with the largest summed saliency are salient (BiLLM's structural search).

    Both parts, the salient columns and the others, are binarized to second order, and the number of columns that leaves
    the least squared error is taken. The error is that of the *saliencies*: so their few large columns part from the
    many small ones. Had the others one plane only, as in the end they have, one more salient column would always help,
    and the search would return its limit.

    Args:
        saliencies: S of the block.
        limit: the number found is below it, and below the width.
    """
    column = saliencies.sum(0)
    ordered = saliencies[:, torch.sort(column, descending=True, stable=True).indices]
    best, chosen = float("inf"), 0
    for count in range(1, min(limit, saliencies.shape[1])):
        found = _second_order_error(ordered[:, :count]) + _second_order_error(ordered[:, count:])
        if found < best:
            best, chosen = found, count
    return salient_mask(column, chosen)


def _second_order_error(values: Tensor) -> float:
    everywhere = torch.ones_like(values, dtype=torch.bool)
    return float((values - binarize_twice(values, everywhere, centred=True)).square().sum())


def split_by_magnitude(
    values: Float[Tensor, "out width"], error_weight: Float[Tensor, " width"] | None = None, per_row: bool = False
) -> Bool[Tensor, "out width"]:
    """The entries above the best of `PERCENTILES` of the magnitudes: one break point for all rows, or one per row.

    A group G of a row under one scale leaves ``Σ λw² − (Σ λ|w|)² / Σ λ``, so the best break point is the one with the
    largest ``Σ_rows Σ_G (Σ λ|w|)² / Σ λ``. All are scored at once, by running sums over the classes that they part the
    magnitudes into.

    Args:
        values: W, of at least one column.
        error_weight: λ > 0 per column; None weighs all alike.
        per_row: every row takes the best for itself. A bitmap says who is above, so that costs no bit more.
    """
    size = values.abs()
    ordered = size.flatten().sort().values
    places = torch.tensor([int(p * (ordered.numel() - 1)) for p in PERCENTILES], device=values.device)
    cuts = ordered[places]
    kind = torch.bucketize(size, cuts)  # the number of break points below an entry
    weight = torch.ones_like(size) if error_weight is None else error_weight.expand_as(size)
    lower = torch.zeros(2, values.shape[0], len(cuts) + 1, dtype=values.dtype, device=values.device)
    lower[0].scatter_add_(1, kind, weight)
    lower[1].scatter_add_(1, kind, weight * size)
    lower = lower.cumsum(2)
    upper = lower[:, :, -1:] - lower
    tiny = torch.finfo(values.dtype).tiny
    gain = lower[1].square() / lower[0].clamp_min(tiny) + upper[1].square() / upper[0].clamp_min(tiny)
    if not per_row:
        gain = gain.sum(0, keepdim=True)
    return size > cuts[gain[:, :-1].argmax(1)][:, None]
