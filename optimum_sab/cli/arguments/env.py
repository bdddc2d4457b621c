"""`optimum-sab env`: versions, devices, and which backend computes on each of them and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optimum_sab.cli.arguments.common import add_common, add_described


def add_command(commands: Any, arguments: Sequence[str] = ()) -> None:
    """Add the command's parser."""
    parser = add_described(commands, "env", "show versions, devices, and which backend computes on each and why")
    add_common(parser, quiet=False)
    parser.set_defaults(run="env.run")
