"""`optimum-sab example DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimum_sab.cli.arguments.common import add_common, add_described


def add_command(commands: Any, arguments: Sequence[str] = ()) -> None:
    """Add the command's parser."""
    parser = add_described(
        commands, "example", "copy the embedded example, a small dense vision-language model, into a folder"
    )
    parser.add_argument("output", type=Path, metavar="DIR", help="where it goes")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in it; other files stay")
    add_common(parser)
    parser.set_defaults(run="example.run")
