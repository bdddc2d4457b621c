"""Compiles `search.c` at first use, once per machine."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from optimum_sab.errors import MissingDependencyError
from optimum_sab.ops.cpu.cache import digest, find_library, keep_library, library_folder
from optimum_sab.ops.cpu.compiler import find_compiler

SOURCE = Path(__file__).with_name("search.c")
FLAGS = (
    "-O3",
    "-std=gnu11",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-march=native",
)
TIME_LIMIT = 120


@lru_cache(maxsize=1)
def load_search() -> ctypes.CDLL:
    """The compiled search.

    Raises:
        MissingDependencyError: there is no C compiler, or it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        raise MissingDependencyError("the simulation of coded planes needs a C compiler: install gcc, or set $CC.")
    about = Path("/proc/cpuinfo")
    machine = about.read_text("utf-8", errors="replace").split("\n\n")[0] if about.exists() else ""
    flags = next((line for line in machine.splitlines() if line.startswith(("flags", "Features"))), "")
    name = f"coded_search-{digest(chr(0).join([SOURCE.read_text('utf-8'), *compiler, *FLAGS, flags]).encode())}"
    with library_folder() as folder:
        path = find_library(folder, name) or _compile(compiler, folder, name)
        library = ctypes.CDLL(str(path))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.coded_advance.argtypes = [pointer, integer, integer, integer]
    library.coded_settle.argtypes = [pointer, integer, integer, integer, pointer]
    library.coded_trace.argtypes = [pointer, pointer]
    return library


def _compile(compiler: list[str], cache: Path, name: str) -> Path:
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        linked = Path(folder, "search.so")
        command = [*compiler, *FLAGS, str(SOURCE), "-o", str(linked)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIME_LIMIT)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            raise MissingDependencyError(f"{compiler[0]} cannot compile {SOURCE.name}: {first}; set $CC to another.")
        return keep_library(cache, name, linked)
