"""What every command takes, and how a wrong call is told."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NoReturn

from optimum_sab.errors import SABError


class WrongCall(Exception):
    """The command line is not one of ours.

    Args:
        usage: of the command that was called.
        message: what is wrong.
    """

    def __init__(self, usage: str, message: str) -> None:
        super().__init__(message)
        self.usage = usage


class FoundWrong(SABError):
    """A command has done its work, and what it found is an error.

    Args:
        message: as every error has it.
        found: what ``--json`` prints beside it.
    """

    def __init__(self, message: str, found: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.found = found


class Parser(argparse.ArgumentParser):
    """A parser that raises `WrongCall`, so that one place says how errors are shown. Options are not abbreviated."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise WrongCall(self.format_usage(), f"{self.prog}: {message}")


def add_common(parser: argparse.ArgumentParser, quiet: bool = True) -> None:
    """Add what stands before or behind a command.

    Args:
        parser: of all commands, or of one.
        quiet: whether the command shows progress.
    """
    # without a default, which would undo what stood before the command
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object, errors too"
    )
    if quiet:
        parser.add_argument(
            "-q", "--quiet", action="store_true", default=argparse.SUPPRESS, help="print no progress, and no summary"
        )
