"""`optimum-sab inspect DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from optimum_sab.cli.arguments.common import add_common, add_described
from optimum_sab.cli.arguments.settings import add_source
from optimum_sab.sources import check_folder


def add_command(commands: Any, arguments: Sequence[str] = ()) -> None:
    """Add the command's parser."""
    parser = add_described(commands, "inspect", "show what a packed checkpoint holds: bits, bytes, settings")
    parser.add_argument("folder", metavar="checkpoint", help="packed checkpoint: folder or Hub repository")
    parser.add_argument("--verify", action="store_true", help="read every tensor and compare it with its digest")
    add_source(parser)
    add_common(parser, quiet=False)
    parser.set_defaults(run="inspect.run", check=check_call)


def check_call(options: argparse.Namespace) -> None:
    """Refuse what is wrong before torch is imported.

    Raises:
        ConfigError: see `check_folder`.
    """
    check_folder(options.folder, options.subfolder or "")
