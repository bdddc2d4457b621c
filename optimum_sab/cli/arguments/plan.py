"""`optimum-sab plan MODEL`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from optimum_sab.cli.arguments.quantize import add_run
from optimum_sab.cli.arguments.settings import check_settings
from optimum_sab.sources import check_folder


def add_command(commands: Any, arguments: Sequence[str] = ()) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "plan",
        help="say what quantizing will take, without reading weights",
        description="What will be binarized, memory on every device, disk, reads of the checkpoint and the time of "
        "every stage, for the same settings as quantize. No weight is read.",
    )
    parser.add_argument("model", help="checkpoint folder or Hub repository")
    parser.add_argument(
        "--no-timing", dest="timing", action="store_false", help="leave out the times, for which this machine is timed"
    )
    add_run(parser, arguments)
    parser.set_defaults(run="plan.run", check=check_call)


def check_call(options: argparse.Namespace) -> None:
    """Refuse what is wrong before torch is imported.

    Raises:
        ConfigError: see `check_folder` and `check_settings`.
        SampleError: see `check_settings`.
    """
    check_folder(options.model, options.subfolder or "")
    check_settings(options)
