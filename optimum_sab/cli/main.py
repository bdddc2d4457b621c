"""The entry point: parses arguments, runs a command, and turns what users can mend into one line and an exit code."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optimum_sab.cli.arguments.common import FoundWrong, WrongCall
from optimum_sab.cli.arguments.parser import build_parser
from optimum_sab.cli.spelling import as_options
from optimum_sab.errors import ConfigError, SABWarning
from optimum_sab.failure import one_line
from optimum_sab.json_values import json_line

FAILED, WRONG_CALL = 1, 2
INTERRUPTED, BROKEN_PIPE = 130, 141  # as shells have it: 128 and the signal's number


def main(arguments: Sequence[str] | None = None, program: str = "optimum-sab") -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes ``sys.argv``.
        program: shown in usage lines.

    Returns:
        Exit code: 0 done; 1 an error was printed in one line; 2 a wrong call; 130 interrupted; 141 whoever was to
        read the output has gone. With ``--json`` an error is an object on standard output too, under "error".
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    first = next((index for index, word in enumerate(given) if not word.startswith("-")), None)
    if first is not None and given[first] == "run":
        return _be(given[first + 1 :], program, argparse.Namespace(json="--json" in given[:first]))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name, or a terminal, that is no Unicode
    options = argparse.Namespace(json="--json" in given)  # until they are parsed
    try:
        build_parser(program, given).parse_args(given, namespace=options)
        if hasattr(options, "check"):
            options.check(options)
        with warnings.catch_warnings():
            warnings.showwarning = _showing(warnings.showwarning)
            find_command(options.run)(options)
        sys.stdout.flush()
    except WrongCall as wrong:
        return _failed(options, str(wrong), WRONG_CALL)
    except KeyboardInterrupt as stopped:
        folder = getattr(options, "resume_folder", None)
        kept = str(stopped) or (f"what is finished is kept in {folder!r}." if _holds_blocks(folder) else "")
        if getattr(options, "silent", False):
            return INTERRUPTED
        return _failed(options, f"interrupted; {kept}" if kept else "interrupted.", INTERRUPTED)
    except BrokenPipeError:
        return _left_alone()
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise  # a fault of ours, whose place must be seen
        if getattr(options, "silent", False) and getattr(error, "told", False):
            return FAILED  # the first rank says it
        return _failed(options, line, FAILED, error.found if isinstance(error, FoundWrong) else {})
    return 0


def find_command(name: str) -> Callable[[argparse.Namespace], None]:
    """The function of a command, "MODULE.FUNCTION" below `optimum_sab.cli.commands`."""
    module, _, function = name.rpartition(".")
    found: Callable[[argparse.Namespace], None]
    found = getattr(importlib.import_module(f"optimum_sab.cli.commands.{module}"), function)
    return found


def _failed(options: argparse.Namespace, line: str, code: int, found: Mapping[str, Any] | None = None) -> int:
    line = as_options(line)
    print(line if code == INTERRUPTED else f"error: {line}", file=sys.stderr)
    if options.json:
        print(json_line({**(found or {}), "error": line, "exit_code": code}))
    return code


def _holds_blocks(folder: str | None) -> bool:
    """Whether a resume folder has anything to go on with."""
    return folder is not None and any(Path(folder).glob("block-*"))


def _left_alone() -> int:
    """Whoever was to read the output has gone. Python would complain once more when it flushes at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def _be(arguments: Sequence[str], program: str, options: argparse.Namespace) -> int:
    """Be another program, whose errors and interruptions are its own."""
    from optimum_sab.cli.commands.run import asks_for_usage, find_program, show_usage

    try:
        if asks_for_usage(arguments):
            code = show_usage(arguments, program)
            if code and options.json:
                print(json_line({"error": "run needs the name of a program.", "exit_code": code}), flush=True)
            return code
        start = find_program(arguments)
    except BrokenPipeError:
        return _left_alone()
    except (ConfigError, OSError) as error:
        return _failed(options, one_line(error) or str(error), FAILED)
    return start()


def _showing(shown_before: Callable[..., None]) -> Callable[..., None]:
    """Our warnings on a line of their own, above the bars, without a place in the code; others as before."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, SABWarning):
            from tqdm.auto import tqdm

            tqdm.write(f"warning: {as_options(str(message))}", file=sys.stderr)
        else:
            shown_before(message, category, *place, **more)

    return show


if __name__ == "__main__":
    raise SystemExit(main())
