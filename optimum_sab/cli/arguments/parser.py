"""The parser of all commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from optimum_sab.cli.arguments import bench, demo, env, eval, example, inspect, plan, quantize, report, run
from optimum_sab.cli.arguments.common import Parser, add_common
from optimum_sab.version import __version__

DESCRIPTION = "Significance-aware binarization of vision-language models."
COMMANDS = (quantize, plan, inspect, report, run, example, demo, eval, bench, env)


def build_parser(program: str, arguments: Sequence[str] = ()) -> Parser:
    """The parser of all commands.

    Args:
        program: shown in usage lines.
        arguments: what it will be given; the help shows the defaults of the preset that they name.
    """
    parser = Parser(program, description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"optimum-sab {__version__}")
    parser.set_defaults(json=False, quiet=False)
    add_common(parser)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_command(commands, arguments)
    return parser


def command_names(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The commands of a parser and what each is for."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {each.dest: each.help or "" for each in found[0]._choices_actions} if found else {}
