"""The entry point: parses arguments, runs a command, and turns what users can mend into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from optimum_sab.errors import ConfigError, SABWarning
from optimum_sab.version import __version__

INTERRUPTED, BROKEN_PIPE = 130, 141  # as shells have it: 128 and the signal's number


def main(arguments: Sequence[str] | None = None, program: str = "optimum-sab") -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes ``sys.argv``.
        program: shown in usage lines.

    Returns:
        Exit code: 0 done; 1 an error was printed in one line; 130 interrupted; 141 whoever
        was to read the output has gone (argparse exits with 2 on a wrong call).
    """
    options = argparse.Namespace()
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["run"]:
        return _be(given[1:], program)
    try:
        parser = build_parser(program)
        parser.parse_args(given, namespace=options)
        with warnings.catch_warnings():
            warnings.showwarning = _showing(warnings.showwarning)
            options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        folder = getattr(options, "resume_folder", None)
        print(f"interrupted{f'; what is finished is kept in {folder!r}' if folder else ''}.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python would complain once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        from optimum_sab.hf.failure import one_line

        line = one_line(error)
        if line is None:
            raise  # a fault of ours, whose place must be seen
        print(f"error: {line}", file=sys.stderr)
        return 1
    return 0


def _be(arguments: Sequence[str], program: str) -> int:
    """Be another program, whose errors and interruptions are its own."""
    from optimum_sab.cli.run import find_program

    try:
        start = find_program(arguments, program)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return start()


def build_parser(program: str) -> argparse.ArgumentParser:
    """The parser of all commands."""
    from optimum_sab.cli import bench, demo, env, eval, inspect, quantize, run

    parser = argparse.ArgumentParser(program, description="Significance-aware binarization of vision-language models.")
    parser.add_argument("--version", action="version", version=f"optimum-sab {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (quantize, inspect, demo, eval, bench, env, run):
        module.add_command(commands)
    return parser


def _showing(shown_before: Callable[..., None]) -> Callable[..., None]:
    """Our warnings on a line of their own, above the bars, without a place in the code; others as before."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, SABWarning):
            from tqdm.auto import tqdm

            tqdm.write(f"warning: {message}", file=sys.stderr)
        else:
            shown_before(message, category, *place, **more)

    return show


if __name__ == "__main__":
    raise SystemExit(main())
