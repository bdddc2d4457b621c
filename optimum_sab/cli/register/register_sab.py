"""Registers `optimum-cli sab`: setup.py installs this file as optimum/commands/register/register_sab.py.

optimum-cli imports it at every start, whatever the command, so what it imports must stay light. This folder must never
hold an `__init__.py`: it would end up inside the `optimum` namespace package.
"""

from optimum_sab.cli.command import SABCommand

REGISTER_COMMANDS = [SABCommand]
