"""Where two trees of JSON values differ."""

from __future__ import annotations

from typing import Any


def difference(there: Any, now: Any, name: str = "", words: tuple[str, str] = ("there", "now")) -> str:
    """The first place where two trees of JSON values differ, in words; empty where they do not.

    Args:
        there: one.
        now: the other.
        name: of the place so far.
        words: where either is.
    """
    if isinstance(there, dict) and isinstance(now, dict):
        for key in [*there, *(k for k in now if k not in there)]:
            inner = difference(there.get(key), now.get(key), f"{name}.{key}" if name else key, words)
            if inner:
                return inner
        return ""
    return "" if there == now else f"{name} is {there!r} {words[0]} and {now!r} {words[1]}"
