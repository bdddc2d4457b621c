"""`optimum-sab report DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimum_sab.cli.arguments.common import add_common, add_described


def add_command(commands: Any, arguments: Sequence[str] = ()) -> None:
    """Add the command's parser."""
    parser = add_described(commands, "report", "make report.html of a packed checkpoint anew from its report.json")
    parser.add_argument("folder", type=Path, metavar="DIR", help="packed checkpoint folder")
    parser.add_argument("--open", action="store_true", help="show the page in the browser")
    add_common(parser)
    parser.set_defaults(run="report.run")
