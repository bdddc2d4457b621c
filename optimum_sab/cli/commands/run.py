"""`optimum-sab run PROGRAM …`: a program that knows nothing of this package, with packed checkpoints registered."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from optimum_sab.errors import ConfigError

USAGE = """usage: {program} run PROGRAM ...
       {program} run -m MODULE ...
       {program} run SCRIPT.py ...

Run a program in this process with packed checkpoints registered in Transformers: an installed Python program (lm_eval,
transformers), a module, or a script. Everything after its name is the program's own, and so is the exit code."""


def asks_for_usage(arguments: Sequence[str]) -> bool:
    """Whether there is no program, or help where its name would be."""
    return not arguments or arguments[0] in ("-h", "--help")


def show_usage(arguments: Sequence[str], program: str) -> int:
    """Print how it is called, and give the exit code: 2 where nothing was said."""
    status = 0 if arguments else 2
    print(USAGE.format(program=program), file=sys.stderr if status else sys.stdout, flush=True)
    return status


def find_program(arguments: Sequence[str]) -> Callable[[], int]:
    """What a command line is to run, found and not begun.

    Args:
        arguments: of the command line, after ``run``; not those that `asks_for_usage`.

    Returns:
        Registers the quantization method and is the program, which reads its own ``sys.argv``. It gives the exit code
        of a program that comes to its end; one that ends with `SystemExit` does so, and its errors stay what they are.

    Raises:
        ConfigError: there is no such program, or it is none that Python runs.
    """
    name, *rest = arguments
    if name == "-m":
        if not rest:
            raise ConfigError("run -m needs the name of a module.")
        _search_first(os.getcwd())  # as `python -m` has it
        if not _is_module(rest[0]):
            raise ConfigError(f"there is no module {rest[0]!r}; see where it is installed ({sys.prefix} here).")
        return partial(_run_module, *rest)
    if Path(name).is_file():
        return partial(_run_script, name, *rest)
    found = next(iter(importlib.metadata.entry_points(group="console_scripts", name=name)), None)
    where = shutil.which(name)
    if found is not None:
        return partial(_run_installed, found, where or name, *rest)
    if where is None:
        raise ConfigError(
            f"{name!r} is no file, and no program that is installed beside this package ({sys.prefix}); name a script, "
            "an installed program, or a module behind -m."
        )
    if not _is_python(Path(where)):
        raise ConfigError(
            f"{where!r} is no Python program, so nothing can be registered in it; put run where it starts Python."
        )
    return partial(_run_script, where, *rest)


def _run_module(module: str, *arguments: str) -> int:
    _register()
    sys.argv = [module, *arguments]  # runpy puts the module's file in the first place
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def _run_script(path: str, *arguments: str) -> int:
    _register()
    _search_first(str(Path(path).resolve().parent))  # as `python SCRIPT` has it
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")
    return 0


def _run_installed(entry: importlib.metadata.EntryPoint, path: str, *arguments: str) -> int:
    _register()
    _search_first(os.path.dirname(path))  # as a script in that folder has it
    sys.argv = [path, *arguments]
    sys.exit(entry.load()())


def _search_first(folder: str) -> None:
    """Where modules are looked for first, in the place of where Python found us; nowhere new with ``python -P``."""
    if not getattr(sys.flags, "safe_path", False):  # Python 3.11
        sys.path[0] = folder


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if f"{name}.".startswith(f"{error.name}."):
            return False
        raise


def _register() -> None:
    importlib.import_module("optimum_sab")


def _is_python(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline(256)
    return first.startswith(b"#!") and b"python" in first
