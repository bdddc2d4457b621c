"""`optimum-sab demo`: the whole path on the embedded example."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimum_sab.cli.arguments.common import add_common, add_described, check_counts, check_seeds
from optimum_sab.cli.arguments.settings import add_settings, check_settings


def add_command(commands: Any, arguments: Sequence[str] = ()) -> None:
    """Add the command's parser."""
    parser = add_described(
        commands, "demo", "binarize the embedded example, reload it in a fresh process, compare accuracy per task"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="keep the packed checkpoint here")
    parser.add_argument(
        "--questions", type=int, default=100, metavar="N", help="held-out questions per task (default: 100)"
    )
    parser.add_argument("--question-seed", type=int, default=0, metavar="N", help="seed of the questions (default: 0)")
    add_settings(parser, arguments)
    add_common(parser)
    parser.set_defaults(run="demo.run", check=check_call)


def check_call(options: argparse.Namespace) -> None:
    """Refuse what is wrong before torch is imported.

    Raises:
        ConfigError, SampleError: see `check_settings`, or no question would be asked.
    """
    check_counts(options, ("questions",))
    check_seeds(options, "question-seed")
    check_settings(options)
