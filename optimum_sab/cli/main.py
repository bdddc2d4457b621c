"""The entry point: parses arguments, runs a command, and turns our errors into one line and exit code 1."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from optimum_sab.errors import SABError
from optimum_sab.version import __version__


def main(arguments: Sequence[str] | None = None, program: str = "optimum-sab") -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes ``sys.argv``.
        program: shown in usage lines.

    Returns:
        Exit code: 0 done, 1 an error of ours was printed (argparse exits with 2 on a wrong call).
    """
    parser = build_parser(program)
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        options.run(options)
    except SABError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser(program: str) -> argparse.ArgumentParser:
    """The parser of all commands."""
    from optimum_sab.cli import bench, demo, env, eval, inspect, quantize

    parser = argparse.ArgumentParser(program, description="Significance-aware binarization of vision-language models.")
    parser.add_argument("--version", action="version", version=f"optimum-sab {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (quantize, inspect, demo, eval, bench, env):
        module.add_command(commands)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
