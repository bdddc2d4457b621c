"""The modes in which a model is only read."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Arguments that keep the model's forward from making a cache, which nothing here reads; none if it makes none."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    takes = any(p.name == "use_cache" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return {"use_cache": False} if takes else {}


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and nothing records gradients; outside, it is in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
