"""Do something as soon as a module of another package is imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def when_imported(module: str, call: Callable[[], Any]) -> None:
    """Call once ``module`` is there: now, if it has been imported, else right after whoever imports it first has.

    Args:
        module: full name.
        call: takes nothing. What it raises, the import raises.
    """
    if module in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Watcher(module, call))


class _Watcher(MetaPathFinder):
    """Finds one module as the other finders do, with a loader that calls when it is done."""

    def __init__(self, module: str, call: Callable[[], Any]) -> None:
        self._module = module
        self._call = call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)  # once
        spec = find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._call()

            loader.exec_module = exec_module
        return spec
