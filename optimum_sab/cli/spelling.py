"""Settings in messages, as the command line spells them: the rest of the package names them as Python does."""

from __future__ import annotations

import re
from functools import cache

from optimum_sab.cli.arguments.settings import SETTINGS

_CALL = re.compile(r"\bSABConfig(?:\.\w+)?\([^)]*\)")  # whoever is told of Python is told in Python


def as_options(message: str) -> str:
    """The message with ``name=value`` as ``--name value``, and names of several words as the options they are.

    Args:
        message: of an error or a warning.
    """
    found, end = [], 0
    for call in _CALL.finditer(message):
        found += [_setting().sub(_option, message[end : call.start()]), call.group()]
        end = call.end()
    return "".join([*found, _setting().sub(_option, message[end:])])


@cache
def _setting() -> re.Pattern[str]:
    names = "|".join(sorted(SETTINGS, key=len, reverse=True))
    words = "|".join(sorted((name for name in SETTINGS if "_" in name), key=len, reverse=True))
    value = r"'[^']*'|\"[^\"]*\"|\.\.\.|-?[\w/:]+(?:\.\w+)*"
    # what is called or looked up is Python, and whoever is told of Python is told in Python
    no_code = r"(?!(?:'[^']*'|\"[^\"]*\"|[\w.]*)(?:\.\w+)*[(\[])"
    outside = r"(?<![\w'\"./\-])"  # of a quoted name, a path, a longer name
    return re.compile(rf"{outside}(?:(?P<name>{names})={no_code}(?P<value>{value})|(?P<word>{words})(?![\w'\"=]))")


def _option(found: re.Match[str]) -> str:
    name = (found["name"] or found["word"]).replace("_", "-")
    value = found["value"]
    if value is None or value == "True":
        return f"--{name}"
    if value == "False":
        return f"--no-{name}"
    plain = value[1:-1] if value[0] in "'\"" and not re.search(r"\s", value) else value
    return f"--{name} {plain}"
