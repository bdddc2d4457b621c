"""Registers `optimum-cli sab`: setup.py installs this file as optimum/commands/register/register_sab.py.

optimum-cli imports it at every start, whatever the command, so it imports nothing of ours (that would bring torch and
Transformers along) until the command runs. This folder must never hold an `__init__.py`: it would end up inside the
`optimum` namespace package.
"""

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class SABCommand(BaseOptimumCLICommand):
    """Hands everything after `optimum-cli sab` to `optimum-sab`."""

    COMMAND = CommandInfo(name="sab", help="Binarize vision-language models: quantize, inspect, run, demo, bench, env.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument(
            "arguments",
            nargs=REMAINDER,
            metavar="quantize|inspect|demo|bench|env …",
            help="as for optimum-sab; `optimum-cli sab quantize --help` shows a command's options",
        )

    def run(self) -> None:
        from optimum_sab.cli.main import main

        raise SystemExit(main(self.args.arguments, program="optimum-cli sab"))


REGISTER_COMMANDS = [SABCommand]
