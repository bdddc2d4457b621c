"""The modes in which a model is only read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
