"""Text that is not ours, such as the names of files and models, in Markdown where it shall be read as it is."""

from __future__ import annotations

import re

# What Markdown, its tables aside, and HTML read anything into; an underscore inside a word is none of it.
_MARKS = re.compile(r"[\\`*\[\]<>&~$#]|(?<!\w)_|_(?!\w)")


def plain(text: str) -> str:
    """Text in one line, in which nothing is markup."""
    return _MARKS.sub(r"\\\g<0>", _one_line(text))


def code(text: str) -> str:
    """Text in one line as a code span, whatever backticks it holds."""
    shown = _one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def cell(markup: str) -> str:
    """Markup as one cell of a table, which a bar would end, inside of code too."""
    return _one_line(markup).replace("|", r"\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())
