"""A digest of tensors and JSON values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def content_digest(place: str, tensors: Mapping[str, Tensor], about: Any) -> str:
    """SHA-256 of where something is kept and what it is: names, shapes, dtypes and every byte, and what is said of it.

    Args:
        place: what the content belongs to; the same content elsewhere has another digest.
        tensors: contiguous, on the CPU.
        about: JSON values.
    """
    digest = hashlib.sha256(json.dumps([place, about]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
