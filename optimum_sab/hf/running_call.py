"""The variables of a call that is running, which Transformers does not hand on to a quantizer."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any


def running_call(function: Callable[..., Any]) -> Mapping[str, Any] | None:
    """The variables of the innermost call of a function that is running; None where none is.

    A call's documented arguments are among its variables, under their own names.

    Args:
        function: as a class or module holds it; a bound method stands for its function.
    """
    code = inspect.unwrap(getattr(function, "__func__", function)).__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return dict(frame.f_locals)
        frame = frame.f_back
    return None
