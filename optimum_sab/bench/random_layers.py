"""A packed layer with random content."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.random_weight import random_packed
from optimum_sab.nn.linear import SABLinear


def random_linear(
    out_features: int,
    in_features: int,
    settings: LayerSettings,
    seed: int = 0,
    device: torch.device | str = "cpu",
    bias: Tensor | None = None,
) -> SABLinear:
    """A `SABLinear` that holds `random_packed`."""
    return SABLinear.from_packed(random_packed(out_features, in_features, settings, seed, device), bias)
