"""Something is to be done as soon as a module of another package is imported, which is not for us to import."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, action: Callable[[], None]) -> None:
    """Call ``action`` now if the module is imported, and whenever it is imported from now on.

    A second call for the same module takes the place of the first.

    Args:
        name: of the module.
        action: may be called again, where the module is reloaded.
    """
    sys.meta_path[:] = [each for each in sys.meta_path if getattr(each, "awaited", None) != name]
    sys.meta_path.insert(0, _Finder(name, action))
    if sys.modules.get(name) is not None:  # None there says that it must not be imported
        importlib.import_module(name)  # waits for another thread that is importing it
        action()


class _Finder(importlib.abc.MetaPathFinder):
    """Leaves finding to the others, and adds the action to what running the module does."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.awaited = name
        self._action = action
        self._asking_others = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.awaited or self._asking_others:
            return None
        self._asking_others = True
        try:
            found = _found_by_others(fullname, path, target)
        finally:
            self._asking_others = False
        if found is not None and found.loader is not None:
            loader: Any = found.loader
            run = loader.exec_module

            def run_and_act(module: ModuleType) -> None:
                run(module)
                if module.__name__ == self.awaited:  # a zip file has one loader for all that is in it
                    self._action()

            loader.exec_module = run_and_act
        return found


def _found_by_others(fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    for finder in list(sys.meta_path):
        find_spec = getattr(finder, "find_spec", None)
        spec: ModuleSpec | None = None if find_spec is None else find_spec(fullname, path, target)
        if spec is not None:
            return spec
    return None
