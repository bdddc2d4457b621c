"""`optimum-sab quantize MODEL --output DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from optimum_sab.cli.arguments.common import add_common, add_described
from optimum_sab.cli.arguments.settings import add_settings, add_source, check_settings
from optimum_sab.sources import check_folder

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_command(commands: Any, arguments: Sequence[str] = ()) -> None:
    """Add the command's parser."""
    parser = add_described(commands, "quantize", "binarize a checkpoint and save it packed")
    parser.add_argument("model", help="checkpoint folder or Hub repository")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the packed checkpoint goes (with --push-to-hub: by default a folder with the repository's name)",
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload it too; a repository that is not there is made")
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: make the repository private")
    parser.add_argument(
        "--remote-code",
        action="store_true",
        help="add a file that makes from_pretrained(…, trust_remote_code=True) enough, without importing optimum_sab",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in the output; other files stay")
    add_run(parser, arguments)
    parser.set_defaults(run="quantize.run", check=partial(check_call, parser))


def add_run(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Add what a run is made of: how the checkpoint is loaded, every setting, and what all commands have.

    Args:
        parser: of a command that quantizes, or plans it.
        arguments: of the call, which name the preset that defaults are of.
    """
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of everything that stays dense")
    parser.add_argument("--device-map", metavar="MAP", help="as in from_pretrained: cpu, auto, cuda:0")
    parser.add_argument("--processor", metavar="PATH", help="processor to use instead of the checkpoint's own")
    add_source(parser)
    add_settings(parser, arguments)
    add_common(parser)


def check_call(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what is wrong before anything is imported.

    Raises:
        WrongCall, ConfigError: see `check_places` and `check_settings`.
    """
    check_places(parser, options)
    check_settings(options)


def check_places(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse a call that says nowhere where the checkpoint goes; without a folder, it has the repository's name.

    Raises:
        WrongCall: neither place is named, or a private repository without its name.
        ConfigError: see `check_folder`.
    """
    if options.output is None and options.push_to_hub is None:
        parser.error("one of --output and --push-to-hub is required")
    if options.private and options.push_to_hub is None:
        parser.error("--private goes with --push-to-hub")
    check_folder(options.model, options.subfolder or "")
    if options.output is None:
        options.output = Path(options.push_to_hub.rstrip("/").split("/")[-1])
