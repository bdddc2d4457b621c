"""Compiles `search.c` at first use, once per machine."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

from optimum_sab.errors import MissingDependencyError
from optimum_sab.ops.cpu.compiler import Build, Library, attempted, compile_library

SOURCE = Path(__file__).with_name("search.c")
FUSED = ("-ffp-contract=fast",)  # nothing else has to come to the same bits


def load_search() -> Library:
    """The compiled search.

    Raises:
        MissingDependencyError: there is no C compiler, or it fails.
    """
    build = _build()
    if build.library is None:
        raise MissingDependencyError(
            f"the simulation of coded planes needs a C compiler: {build.reason}. Install gcc, or set $CC."
        )
    return build.library


@lru_cache(maxsize=1)
def _build() -> Build:
    return attempted(lambda: compile_library(FUSED, (SOURCE,), _declare))


def _declare(library: Library) -> None:
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.coded_advance.argtypes = [pointer, integer, integer, integer]
    library.coded_settle.argtypes = [pointer, integer, integer, integer, pointer]
    library.coded_trace.argtypes = [pointer, pointer]
