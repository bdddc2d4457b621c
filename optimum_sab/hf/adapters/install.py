"""Ours put around PEFT's functions, as soon as PEFT is there."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from optimum_sab.errors import warn

PACKAGE = "peft"  # `optimum_sab` calls `install` when it is imported
THEIRS = "_without_packed_layers"  # PEFT's own function, kept on ours


def install() -> None:
    """Put ours around PEFT's functions. A release of PEFT that lacks one of them is left alone, with a warning."""
    try:
        from optimum_sab.hf.adapters.around import places

        found = [(place, getattr(place.owner, place.name)) for place in places()]
    except (ImportError, AttributeError) as error:
        version = getattr(sys.modules.get(PACKAGE), "__version__", "?")
        warn(f"PEFT {version} cannot adapt packed layers ({error}); install peft>=0.21.")
        return
    for place, known in found:
        _put_around(place.owner, place.name, known, place.ours)


def _put_around(owner: Any, name: str, known: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """``owner.name`` becomes ``ours(theirs, …)``, also in modules that have taken it by name."""
    theirs = getattr(known, THEIRS, known)

    @functools.wraps(theirs)
    def around(*arguments: Any, **options: Any) -> Any:
        return ours(theirs, *arguments, **options)

    setattr(around, THEIRS, theirs)
    setattr(owner, name, around)
    if inspect.ismodule(owner):
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is known:
                setattr(module, name, around)
