"""Standing in for the forwards of modules for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def patched_forwards(forwards: Mapping[nn.Module, Callable[..., Any]], method: str = "forward") -> Iterator[None]:
    """Inside, these modules have other forwards; outside, their own, those that someone had patched in before too.

    Args:
        forwards: by module.
        method: which of its methods it is instead.
    """
    own = {module: vars(module).get(method) for module in forwards}  # accelerate's hooks put one there
    try:
        for module, forward in forwards.items():
            setattr(module, method, forward)
        yield
    finally:
        for module, before in own.items():
            vars(module).pop(method, None)
            if before is not None:
                setattr(module, method, before)
