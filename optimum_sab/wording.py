"""What messages have in common: a name that was meant, a count with its noun, a page of the documentation,
a number of bytes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

NEAR = 0.7
"""Of a ratio of `difflib`, from which on a name is near enough to have been meant."""
TYPO = 0.85
"""Likewise, from which on a letter or two are wrong and nothing else."""
MOST_MEANT = 3
LEAST_LETTERS = 3  # of a word that tells what was meant
_SEPARATOR = re.compile(r"[-_ ]+")
_SAME = (  # no letters tell these; without separators
    frozenset(("float16", "fp16", "f16", "half")),
    frozenset(("bfloat16", "bf16")),
    frozenset(("float32", "fp32", "f32", "float", "single")),
    frozenset(("twobit", "2bit", "2bits", "twobits")),
    frozenset(("default", "1bit", "onebit")),  # the preset of one bit
)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one was meant to be; None where none is near."""
    close = difflib.get_close_matches(word, list(known), 1, NEAR)
    return close[0] if close else None


def meant(word: str, known: Iterable[str]) -> list[str]:
    """The known names, of one word or several, that an unknown one may have been meant to be.

    Args:
        word: as it was written, such as ``samples``.
        known: names of words with hyphens or underscores between them.

    Returns:
        Those that are other names for the same; else the one of nearly the same letters; else those with all of its
        words, or the beginnings of them (``calibration_samples``); else those with its last word; else the one of
        somewhat the same letters.
    """
    known = list(known)
    own = {_SEPARATOR.sub("-", name.lower()): name for name in known}
    written = _SEPARATOR.sub("-", word.lower())
    asked = [part for part in written.split("-") if part]
    spelt = [name for name in [nearest(written, own)] if name]
    typo = [name for name in spelt if difflib.SequenceMatcher(None, written, name).ratio() > TYPO]

    def with_words(begun: list[str]) -> list[str]:
        words = {name: name.split("-") for name in own if not name.startswith("no-")}
        found = [name for name, of in words.items() if all(any(part.startswith(each) for part in of) for each in begun)]
        return found[:MOST_MEANT] if any(len(each) >= LEAST_LETTERS for each in begun) else []

    return other_names(word, known) or [
        own[name] for name in typo or with_words(asked) or with_words(asked[-1:]) or spelt
    ]


def other_names(word: str, known: Iterable[str]) -> list[str]:
    """The known names for what a word is another name for, such as ``float16`` for ``fp16``."""
    bare = _SEPARATOR.sub("", word.lower())
    same = next((group for group in _SAME if bare in group), frozenset())
    return [name for name in known if _SEPARATOR.sub("", name.lower()) in same]


def did_you_mean(word: str, known: Iterable[str], otherwise: str = ".") -> str:
    """The end of a sentence about a name that is not known.

    Args:
        word: as it was written.
        known: what it may be.
        otherwise: the end where none of them is near, such as what there is.

    Returns:
        ``"; did you mean 'name'?"``, of several with an "or" between them; or ``otherwise``.
    """
    close = meant(word, known)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else otherwise


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun, ``"1 thread"`` or ``"1,024 threads"``; the plural takes an s unless it is given."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def page(name: str) -> str:
    """A page of the documentation in a message: an installed package has no folder of them."""
    return f"the page {name!r} of optimum-sab's documentation"


def size_in_words(size: int) -> str:
    """Bytes as people read them."""
    return (
        f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB" if size >= 10**5 else f"{size / 1e3:.1f} kB"
    )
