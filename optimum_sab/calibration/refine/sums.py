"""Training on samples that several ranks share: all take the same steps, each with the gradients of its own samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optimum_sab.calibration.ranks import Ranks


def of_all(ranks: Ranks, at: str, own: Mapping[int, int]) -> dict[int, int]:
    """What every rank knows of its samples, by their index, ascending.

    Args:
        ranks: who knows.
        at: what it is about.
        own: of this rank's samples.
    """
    told = ranks.exchange(at, dict(own))
    return dict(sorted((index, value) for each in told for index, value in each.items()))


def add_up_gradients(ranks: Ranks, tensors: Sequence[Tensor]) -> None:
    """Make every tensor's gradient the sum of all ranks'. One that no rank has a gradient of keeps none.

    Args:
        ranks: whose.
        tensors: leaves, the same in the same order on every rank.
    """
    if ranks.size == 1:
        return
    told = ranks.exchange("gradients", [tensor.grad is not None for tensor in tensors])
    reached = [tensor for tensor, some in zip(tensors, zip(*told, strict=True), strict=True) if any(some)]
    if not reached:
        return
    place = reached[0].device
    own = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in reached]
    flat = torch.cat([each.flatten().to(place) for each in own])
    ranks.sum_to(None, flat)
    for tensor, part in zip(reached, flat.split([each.numel() for each in reached]), strict=True):
        tensor.grad = part.view_as(tensor).to(tensor.device)


def mean_of_all(ranks: Ranks, at: str, errors: Sequence[Tensor]) -> float:
    """Mean over the tokens of all ranks' samples: one number, the same everywhere.

    Args:
        ranks: who has them.
        at: what they are.
        errors: of this rank's tokens, one-dimensional; some tensors, or none.
    """
    own = torch.cat(list(errors)).cpu() if errors else torch.zeros(0)
    return float(torch.cat(ranks.exchange(at, own)).mean())
