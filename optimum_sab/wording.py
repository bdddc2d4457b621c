"""What messages have in common: a name that was meant, a count with its noun, a page of the documentation."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

NEAR = 0.7
"""Of a ratio of `difflib`, from which on a name is near enough to have been meant."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one was meant to be; None where none is near."""
    close = difflib.get_close_matches(word, list(known), 1, NEAR)
    return close[0] if close else None


def did_you_mean(word: str, known: Iterable[str], otherwise: str = ".") -> str:
    """The end of a sentence about a name that is not known.

    Args:
        word: as it was written.
        known: what it may be.
        otherwise: the end where none of them is near, such as what there is.

    Returns:
        ``"; did you mean 'name'?"``, or ``otherwise``.
    """
    close = nearest(word, known)
    return otherwise if close is None else f"; did you mean {close!r}?"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun, ``"1 thread"`` or ``"1,024 threads"``; the plural takes an s unless it is given."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def page(name: str) -> str:
    """A page of the documentation in a message: an installed package has no folder of them."""
    return f"the page {name!r} of optimum-sab's documentation"
