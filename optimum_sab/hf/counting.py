"""`num_parameters()` of a packed model: as many as the dense model has, not as many integers as hold them.

A quantizer is not asked. So `install` puts the count around the method that all models have; it leaves those without
packed layers alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from optimum_sab.nn.linear import SABLinear


def install() -> None:
    """Have every model count its packed layers' weights. Doing it again changes nothing."""
    counting: Any = PreTrainedModel.num_parameters
    PreTrainedModel.num_parameters = as_dense(getattr(counting, "without_packed", counting))


def as_dense(count: Callable[..., int]) -> Callable[..., int]:
    """`PreTrainedModel.num_parameters` that counts a packed weight [out, in] as out · in."""

    @functools.wraps(count)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        total = count(self, only_trainable, exclude_embeddings)
        if only_trainable:  # a packed weight is not
            return total
        layers = [module for module in self.modules() if isinstance(module, SABLinear)]
        packed = sum(tensor.numel() for layer in layers for tensor in layer.tensors)
        return total - packed + sum(layer.counted for layer in layers)

    num_parameters.without_packed = count  # type: ignore[attr-defined]
    return num_parameters
