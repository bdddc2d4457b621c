"""Registers `optimum-cli sab`: setup.py installs this file as optimum/commands/register/register_sab.py.

optimum-cli imports it at every start, whatever the command, so it imports nothing that brings torch or Transformers
along until a command runs. This folder must never hold an `__init__.py`: it would end up inside the `optimum`
namespace package.
"""

from argparse import REMAINDER, ArgumentParser, RawDescriptionHelpFormatter

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_sab.cli.arguments.parser import build_parser, command_names

PROGRAM = "optimum-cli sab"


class SABCommand(BaseOptimumCLICommand):
    """Hands everything after `optimum-cli sab` to `optimum-sab`."""

    COMMAND = CommandInfo(name="sab", help="Binarize vision-language models.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        commands = command_names(build_parser(PROGRAM))
        width = max(map(len, commands))
        parser.add_argument("arguments", nargs=REMAINDER, metavar="COMMAND …", help="as for optimum-sab")
        parser.formatter_class = RawDescriptionHelpFormatter  # others make one paragraph of the table
        parser.epilog = "\n".join(
            [
                "commands:",
                *(f"  {name:<{width}}  {purpose}" for name, purpose in commands.items()),
                "",
                f"`{PROGRAM} COMMAND --help` shows a command's options.",
            ]
        )

    def run(self) -> None:
        from optimum_sab.cli.main import main

        raise SystemExit(main(self.args.arguments, program=PROGRAM))


REGISTER_COMMANDS = [SABCommand]
