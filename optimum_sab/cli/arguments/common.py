"""What every command takes, and how a wrong call is told."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from optimum_sab.core.bounds import shown
from optimum_sab.errors import ConfigError, SABError
from optimum_sab.presets import MOST_SAMPLES, MOST_SEED, PRESETS
from optimum_sab.wording import meant, other_names

_MISSPELT = re.compile(
    r"unrecognized arguments: (?P<option>--\S+).*|argument (?P<name>.*?): invalid choice: '(?P<choice>[^']*)'.*"
)


class WrongCall(Exception):
    """The command line is not one of ours; the message says what is wrong and which help shows what is right."""


class FoundWrong(SABError):
    """A command has done its work, and what it found is an error.

    Args:
        message: as every error has it.
        found: what ``--json`` prints beside it.
    """

    def __init__(self, message: str, found: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.found = found


class Parser(argparse.ArgumentParser):
    """A parser that raises `WrongCall`, so that one place says how errors are shown. Options are not abbreviated."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        misspelt = _MISSPELT.fullmatch(message)
        close: list[str] = []
        if misspelt and misspelt["option"]:
            written = misspelt["option"].split("=")[0].strip("-")
            options = {name.strip("-"): name for name in self._option_string_actions if name.startswith("--")}
            preset = self._preset(written) if "preset" in options else None
            close = [f"--preset {preset}"] if preset else [options[name] for name in meant(written, options)]
        elif misspelt:
            close = meant(misspelt["choice"], self._choices(misspelt["name"]))
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise WrongCall(f"{message}.{hint} See: {self.prog} --help")

    def _choices(self, name: str) -> list[str]:
        """Of the option, or the argument, that argparse calls this in its errors."""
        found = (action for action in self._actions if argparse._get_action_name(action) == name)
        return [str(choice) for action in found for choice in action.choices or ()]

    @staticmethod
    def _preset(written: str) -> str | None:
        """The preset that is written as if it were an option."""
        name = written.replace("_", "-")
        return name if name in PRESETS else next(iter(other_names(name, PRESETS)), None)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse has it, but a command refuses what it does not know itself, with its own help."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown


def add_common(parser: argparse.ArgumentParser, quiet: bool = True) -> None:
    """Add what stands before or behind a command.

    Args:
        parser: of all commands, or of one.
        quiet: whether the command shows progress.
    """
    # without a default, which would undo what stood before the command
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object, errors too"
    )
    if quiet:
        parser.add_argument(
            "-q", "--quiet", action="store_true", default=argparse.SUPPRESS, help="print no progress, and no summary"
        )


def add_described(commands: Any, name: str, what: str) -> Any:
    """Add the parser of a command whose help begins with the sentence that stands in the list of commands.

    Args:
        commands: all of them.
        name: of the command.
        what: it does.
    """
    return commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")


def check_counts(options: argparse.Namespace, names: Iterable[str]) -> None:
    """Refuse numbers of something of which there must be one.

    Args:
        options: as they were parsed; each is a number, several, or None.
        names: of the options, without their dashes.

    Raises:
        ConfigError: names the first that is below 1, or above what anybody could wait for.
    """
    for name in names:
        for each in _given(options, name):
            if each < 1:
                raise ConfigError(f"--{name} {shown(each)} must be at least 1.")
            if each > MOST_SAMPLES:
                raise ConfigError(f"--{name} {shown(each)} must be at most {MOST_SAMPLES}.")


def check_seeds(options: argparse.Namespace, name: str) -> None:
    """Refuse seeds that no generator takes.

    Args:
        options: as they were parsed; it is a number or several.
        name: of the option, without its dashes.

    Raises:
        ConfigError: names the first that is negative or too large.
    """
    for each in _given(options, name):
        if not 0 <= each <= MOST_SEED:
            raise ConfigError(f"--{name} {shown(each)} must be from 0 to {MOST_SEED}.")


def check_amounts(options: argparse.Namespace, names: Iterable[str]) -> None:
    """Refuse what is no amount of anything.

    Args:
        options: as they were parsed.
        names: of the options, without their dashes.

    Raises:
        ConfigError: names the first that is not above 0, or not finite.
    """
    for name in names:
        for each in _given(options, name):
            if not 0.0 < each < float("inf"):
                raise ConfigError(f"--{name} {each} must be a number above 0.")


def _given(options: argparse.Namespace, name: str) -> list[Any]:
    """What was given for an option: a number, several, or none."""
    given = getattr(options, name.replace("-", "_"))
    return given if isinstance(given, list) else [] if given is None else [given]
