"""`optimum-sab run PROGRAM …`, whose arguments are the program's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def add_command(commands: Any, arguments: Sequence[str] = ()) -> None:
    """Name the command in the help; `optimum_sab.cli.commands.run` reads its arguments, which are not for argparse."""
    commands.add_parser("run", help="run a program that does not import optimum_sab, such as lm_eval", add_help=False)
