"""A packed layer that passes for an `nn.Linear`, which is what a library of adapters asks for by class."""

from __future__ import annotations

import torch
from torch import nn

from optimum_sab.nn.linear import SABLinear


class AdaptedSABLinear(SABLinear, nn.Linear):  # type: ignore[misc]  # forward's argument has another name
    """`SABLinear` in a model with adapters: the same tensors and the same computation, and an `nn.Linear` by class.

    A layer becomes one by `adapted`, never by construction. Whoever finds it by its class must not read its ``weight``,
    which is packed; who may is decided in `optimum_sab.hf.adapters`.

    Attributes:
        compute_dtype: of the activations around the layer, which adapters follow; the packed weight says nothing of it.
    """

    compute_dtype: torch.dtype


def adapted(layer: SABLinear, compute_dtype: torch.dtype) -> AdaptedSABLinear:
    """The same layer, in place, as `AdaptedSABLinear`; doing it again renews the dtype.

    Args:
        layer: packed; its tensors, layout and group stay what they are.
        compute_dtype: of the activations it is given.
    """
    layer.__class__ = AdaptedSABLinear
    assert isinstance(layer, AdaptedSABLinear)
    layer.compute_dtype = compute_dtype
    return layer
