"""Compiles C at first use with the system's compiler, once per machine, and loads it: `binary_linear.c`, the linears.

Importing this module compiles nothing and works on every platform.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from optimum_sab.errors import MissingDependencyError
from optimum_sab.ops.cpu.cache import digest, find_library, keep_library, library_folder

SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in ("binary_linear.c", "coded.h", "dots.h", "experts.h", "integers.h", "pool.h")
)
THREADS = ("-pthread",)
FLAGS = (
    *("-O3", "-std=gnu11", *THREADS, "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"),
)
# Clang for Arm, Apple's among them, knows -march=native since lately only, and every compiler -mcpu=native.
NATIVE = ("-mcpu=native",) if platform.machine() in ("aarch64", "arm64") else ("-march=native",)
COMPILERS = ("cc", "gcc", "clang")
PATHS = {2: "AVX-512", 1: "AVX2", 0: "portable code"}  # of sab_path
TIME_LIMIT = 120
REMEDY = "Install gcc or clang, or set $CC to one; without it packed linears run on the slower torch path."


@dataclass(frozen=True)
class Availability:
    """Whether the compiled kernel can be used on this machine.

    Attributes:
        usable: `load_library` gives a library.
        reason: for people: what was compiled, or what is missing.
    """

    usable: bool
    reason: str


class Library(ctypes.CDLL):
    """What was compiled, with the types of its functions set.

    Attributes:
        kind: of the linears: what `sab_path` and `sab_matrix_unit` say.
    """

    kind: tuple[int, int]


@dataclass(frozen=True)
class Build:
    """Outcome of `compile_library`.

    Attributes:
        library: what was compiled, or None.
        reason: as in `Availability`.
    """

    library: Library | None
    reason: str


@dataclass(frozen=True)
class Recipe:
    """What a library is made with.

    Attributes:
        compiler: its command.
        version: what it says of itself.
        flags: for compiling.
        link_flags: for linking.
        sources: the file, and headers of ours that it includes.
    """

    compiler: list[str]
    version: str
    flags: list[str]
    link_flags: list[str]
    sources: tuple[Path, ...] = SOURCES

    @property
    def name(self) -> str:
        """Of the library's file: another recipe, source or machine has another."""
        contents = [path.read_text("utf-8") for path in self.sources]
        key = [*contents, *self.compiler, self.version, *self.flags, "link", *self.link_flags, _machine()]
        return f"{self.sources[0].stem}-{digest(chr(0).join(key).encode())}"


def availability() -> Availability:
    """Whether the kernel is usable here, compiling it if that has not been done; never raises."""
    build = _build()
    return Availability(build.library is not None, build.reason)


def load_library() -> Library:
    """The compiled kernel, the same object at every call.

    Raises:
        MissingDependencyError: it cannot be compiled or loaded; the message gives the reason and the remedy.
    """
    build = _build()
    if build.library is None:
        raise MissingDependencyError(f"The CPU kernel is not available: {build.reason}. {REMEDY}")
    return build.library


def usable_library() -> Library | None:
    """`load_library`, or None where that would raise."""
    return _build().library


@lru_cache(maxsize=1)
def _build() -> Build:
    """The process's one attempt."""
    return attempted(compile_library)


def attempted(build: Callable[[], Build]) -> Build:
    """What ``build`` gives; what it raises where the machine is at fault becomes a reason."""
    try:
        return build()
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        # A cache that cannot be written, no home folder, quotes in $CC that do not close, a compiler that hangs.
        return Build(None, f"{type(error).__name__}: {error}")


def declare_linears(library: Library) -> None:
    """Set the types of `binary_linear.c`'s functions."""
    pointer, integer, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.sab_linear.argtypes = [pointer, pointer, pointer, pointer, wide, integer, integer]
    library.sab_linears.argtypes = [integer, pointer, pointer, pointer, pointer, wide, integer, integer]
    library.sab_experts.argtypes = [pointer, pointer, pointer, pointer, pointer, wide, wide, integer, integer]
    library.sab_dequantize.argtypes = [pointer, wide, wide, pointer, integer, integer]
    library.kind = library.sab_path(), library.sab_matrix_unit()


def compile_library(
    extra: tuple[str, ...] = (),
    sources: tuple[Path, ...] = SOURCES,
    declare: Callable[[Library], None] = declare_linears,
) -> Build:
    """Compile, or take from the cache, and load.

    Args:
        extra: flags that force a path, as ``-DSAB_PATH=0`` does.
        sources: the file, which has a function ``sab_path``, and headers of ours that it includes.
        declare: sets the types of its functions.
    """
    if os.name != "posix":
        return Build(None, f"{platform.system()} has no compiler that is known to work here")
    compiler = find_compiler()
    if compiler is None:
        chosen = os.environ.get("CC")
        found = f"$CC={chosen!r} is not a program" if chosen else f"none of {', '.join(COMPILERS)} is on the path"
        return Build(None, f"no C compiler, {found}")
    version = _run([*compiler, "--version"])
    if version.returncode:
        return Build(None, f"{shlex.join(compiler)} --version fails: {_first_line(version.stderr)}")
    runtime = openmp_runtime()
    if runtime is not None:
        # Two OpenMP runtimes in one process would each keep all cores busy. Ours leaves OpenMP's symbols undefined and
        # gets torch's, which only symbols opened for all to see can satisfy.
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
    # A compiler without OpenMP, or one whose OpenMP is not the runtime in this process, is tried without.
    attempts = [(("-fopenmp",), () if runtime else ("-fopenmp",), "OpenMP"), ((), (), "without OpenMP")]
    failure = ""
    with library_folder() as folder:
        for compile_flags, link_flags, threading in attempts:
            for native in (NATIVE, ()):
                recipe = Recipe(
                    compiler, version.stdout, [*FLAGS, *native, *compile_flags, *extra], list(link_flags), sources
                )
                library, failure = _obtain(recipe, folder)
                if library is not None:
                    declare(library)
                    how = f"{_instructions(library)}, {threading}"
                    return Build(library, f"compiled with {shlex.join(compiler)} ({how})")
    return Build(None, failure)


def _instructions(library: Library) -> str:
    """What the library computes with, for people."""
    more = {"sab_vnni": " with VNNI", "sab_dots": " with dot products"}  # the linears have these functions
    has = (words for name, words in more.items() if getattr(library, name, int)())
    return PATHS[library.sab_path()] + "".join(has)


def find_compiler() -> list[str] | None:
    """The compiler's command: $CC (which may hold arguments) if set, else the first of `COMPILERS` on the path."""
    chosen = os.environ.get("CC")
    for command in [shlex.split(chosen)] if chosen else [[name] for name in COMPILERS]:
        program = shutil.which(command[0]) if command else None
        if program:
            return [program, *command[1:]]
    return None


def openmp_runtime() -> str | None:
    """File of the OpenMP runtime that torch has loaded, torch's own copy before others; None if there is none."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    found = re.findall(r"\s(/.*/lib(?:gomp|iomp|omp)[^/]*\.so[^/\s]*)$", maps.read_text("utf-8"), re.MULTILINE)
    home = str(Path(torch.__file__).parent)
    return min(found, key=lambda path: not path.startswith(home), default=None)


def _obtain(recipe: Recipe, folder: Path) -> tuple[Library | None, str]:
    """The library of this recipe, from the folder or compiled, or why there is none."""
    path, failure = find_library(folder, recipe.name), ""
    if path is None:
        path, failure = _compile(recipe, folder)
    return (None, failure) if path is None else _load(path)


def _compile(recipe: Recipe, cache: Path) -> tuple[Path | None, str]:
    """The library, put in the cache, or the compiler's error."""
    compiler = recipe.compiler
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        compiled, linked = Path(folder, "compiled.o"), Path(folder, "linked.so")
        for command in (
            [*compiler, *recipe.flags, "-c", str(recipe.sources[0]), "-o", str(compiled)],
            [*compiler, "-shared", *THREADS, *recipe.link_flags, str(compiled), "-o", str(linked), "-lm"],
        ):
            done = _run(command)
            if done.returncode:
                return None, f"{shlex.join(compiler)} fails: {_first_line(done.stderr)}"
        return keep_library(cache, recipe.name, linked), ""


def _load(path: Path) -> tuple[Library | None, str]:
    """The library, or why it cannot be loaded (as with an OpenMP that is not the one in this process)."""
    try:
        return Library(str(path)), ""
    except OSError as error:
        return None, str(error)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIME_LIMIT
    )


def _first_line(text: str) -> str:
    """The first line that names an error, or the first."""
    lines = [line for line in text.splitlines() if line.strip()] or ["no message"]
    return next((line for line in lines if "error" in line), lines[0])


def _machine() -> str:
    """What `NATIVE` and the loader look at, so that machines that share a cache share no library."""
    cpuinfo = Path("/proc/cpuinfo")
    found = []
    if cpuinfo.exists():
        for line in cpuinfo.read_text("utf-8", errors="replace").split("\n\n")[0].splitlines():
            if line.split("\t")[0].strip() in ("flags", "Features", "model name", "CPU part"):
                found.append(line)
    return "\n".join([platform.machine(), platform.processor(), *platform.libc_ver(), *found])
