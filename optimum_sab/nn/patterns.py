"""Regular expressions searched in many names at once, in time that no pattern can make explode.

Python's ``re`` tries one way through a pattern after another, which takes ``n^k`` steps where k wildcards stand behind
each other. A configuration may come with a checkpoint from anywhere, so here all ways are followed together: a set of
places in the names is one integer, a bit for each place, and every part of a pattern maps the set of places where it
may begin to the set where it may end. The answer is that of ``re.search``.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from optimum_sab.errors import ConfigError

if sys.version_info >= (3, 11):
    from re import _constants as _ops  # type: ignore[attr-defined]
    from re import _parser as _regex  # type: ignore[attr-defined]
else:
    import sre_constants as _ops
    import sre_parse as _regex

PLAIN = re.compile(r"[\w.-]+")
LONGEST = 1000  # characters of a pattern
STEPS = 50_000  # of one pattern, each a few operations on all names together
DEPTH = 40  # groups inside groups
_NAME_LENGTH = 100  # how often a repeated part is counted, at most: names are about as long as that

_CATEGORIES = {
    _ops.CATEGORY_DIGIT: r"\d",
    _ops.CATEGORY_NOT_DIGIT: r"\D",
    _ops.CATEGORY_SPACE: r"\s",
    _ops.CATEGORY_NOT_SPACE: r"\S",
    _ops.CATEGORY_WORD: r"\w",
    _ops.CATEGORY_NOT_WORD: r"\W",
}
_REPEATS = (_ops.MAX_REPEAT, _ops.MIN_REPEAT)


class NameSearch:
    """Finds in which of some names a pattern is found.

    Args:
        names: what is searched.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._text = "\n".join(names) + "\n"  # a line break only parts names: no step leads over it
        lengths = [len(name) for name in names]
        self._starts = [0]
        for length in lengths:
            self._starts.append(self._starts[-1] + length + 1)
        self._ends = _bits([start + length for start, length in zip(self._starts, lengths, strict=False)])
        self._begins = _bits(self._starts[:-1])
        self._places = (1 << len(self._text)) - 1 if names else 0
        self._characters = sorted(set(self._text) - {"\n"})
        self._masks: dict[Any, int] = {}

    def find(self, pattern: str) -> list[str]:
        """The names in which ``re.search`` would find ``pattern``, in their order.

        Raises:
            ConfigError: see `parse`.
        """
        parts, flags = parse(pattern)
        reached = self._follow(parts, self._places, flags, 1)
        found, bits, place = [], bin(reached)[:1:-1], 0
        while (place := bits.find("1", place)) >= 0:
            index = bisect_right(self._starts, place) - 1
            found.append(self._names[index])
            place = self._starts[index + 1]
        return found

    def _follow(self, parts: Sequence[tuple[Any, Any]], places: int, flags: int, way: int) -> int:
        """Where the parts, one behind the other, may end if they begin at ``places``; with ``way`` −1 the reverse."""
        for part in parts if way > 0 else reversed(parts):
            if not places:
                break
            places = self._step(part[0], part[1], places, flags, way)
        return places

    def _step(self, kind: Any, value: Any, places: int, flags: int, way: int) -> int:
        if kind is _ops.BRANCH:
            ends = 0
            for branch in value[1]:
                ends |= self._follow(list(branch), places, flags, way)
            return ends
        if kind is _ops.SUBPATTERN:
            _, added, taken, inner = value
            return self._follow(list(inner), places, (flags | added) & ~taken, way)
        if kind in _REPEATS:
            return self._repeat(value, places, flags, way)
        if kind is _ops.AT:
            return places & self._at(value, flags)
        if kind in (_ops.ASSERT, _ops.ASSERT_NOT):
            direction, inner = value  # what lies ahead is followed back from everywhere, what lies behind forward
            there = self._follow(list(inner), self._places, flags, -direction)
            return places & (there if kind is _ops.ASSERT else ~there)
        mask = self._mask(kind, tuple(value) if kind is _ops.IN else value, flags)
        return (places & mask) << 1 if way > 0 else (places >> 1) & mask

    def _repeat(self, value: Any, places: int, flags: int, way: int) -> int:
        least, most, parts = value[0], value[1], list(value[2])
        for _ in range(least):
            before, places = places, self._follow(parts, places, flags, way)
            if places == before:  # nothing, or a part that takes nothing
                break
        ends, fresh, count = places, places, least
        while fresh and count < most:
            fresh = self._follow(parts, fresh, flags, way) & ~ends
            ends |= fresh
            count += 1
        return ends

    def _at(self, where: Any, flags: int) -> int:
        if where in (_ops.AT_BEGINNING, _ops.AT_BEGINNING_STRING):
            return self._begins
        if where in (_ops.AT_END, _ops.AT_END_STRING):
            return self._ends
        word = self._mask(_ops.IN, ((_ops.CATEGORY, _ops.CATEGORY_WORD),), flags)
        edge = word ^ (word << 1)
        return edge if where is _ops.AT_BOUNDARY else self._places & ~edge

    def _mask(self, kind: Any, value: Any, flags: int) -> int:
        """Places in front of a character that the part takes."""
        key = (kind, value, flags)
        if key not in self._masks:
            table = {ord(each): "01"[_accepts(kind, value, each, flags)] for each in self._characters}
            self._masks[key] = int(self._text.translate({**table, 10: "0"})[::-1], 2)
        return self._masks[key]


@lru_cache(maxsize=4096)
def parse(pattern: str, prefix: str = "") -> tuple[list[Any], int]:
    """The parts of a regular expression, and its flags.

    Args:
        pattern: the expression.
        prefix: what stood before it in the rule, which errors show as it was given.

    Raises:
        ConfigError: it is none, or it has what the search does not follow: more than `LONGEST` characters or `STEPS`
            steps, references to groups, possessive repeats.
    """
    if PLAIN.fullmatch(pattern):  # nothing to parse, and there may be many
        return [(_ops.ANY, None) if each == "." else (_ops.LITERAL, ord(each)) for each in pattern], 0
    rule = prefix + pattern
    if len(pattern) > LONGEST:
        raise ConfigError(
            f"the module rule {rule[:60]!r}… has {len(pattern)} characters, more than the {LONGEST} that are "
            "searched; write several rules, or whole module names."
        )
    try:
        parsed = _regex.parse(pattern)
        taken = _steps(parsed, rule, 0)
    except re.error as error:
        place = "" if error.pos is None else f" at character {error.pos + len(prefix) + 1}"
        plain = f"a plain name without {prefix!r}" if prefix else "a plain name"
        raise ConfigError(
            f"the module rule {rule!r} is no regular expression: {error.msg}{place}; put a backslash before what is to "
            rf"be found as it stands, such as '\(' for '(', or write {plain}."
        ) from error
    except (RecursionError, OverflowError) as error:
        raise ConfigError(f"the module rule {rule!r} is no regular expression: {error}; simplify it.") from error
    if taken > STEPS:
        raise ConfigError(
            f"the module rule {rule!r} takes {taken} steps to search, more than the {STEPS} that are allowed: "
            "it repeats what is repeated already; use a simpler expression, or several."
        )
    return list(parsed), parsed.state.flags


def steps(pattern: str, prefix: str = "") -> int:
    """Steps that searching takes, at most; takes and raises what `parse` does."""
    return _steps(parse(pattern, prefix)[0], prefix + pattern, 0)


def _steps(parts: Any, rule: str, depth: int) -> int:
    if depth > DEPTH:
        raise ConfigError(f"the module rule {rule!r} has more than {DEPTH} groups inside each other; simplify it.")
    total = 0
    for kind, value in parts:
        if kind is _ops.BRANCH:
            total += sum(_steps(branch, rule, depth + 1) for branch in value[1])
        elif kind is _ops.SUBPATTERN:
            total += _steps(value[3], rule, depth + 1)
        elif kind in _REPEATS:
            least, most, inner = value
            total += min(int(most), least + _NAME_LENGTH) * _steps(inner, rule, depth + 1)
        elif kind in (_ops.ASSERT, _ops.ASSERT_NOT):
            total += _steps(value[1], rule, depth + 1)
        elif kind not in (_ops.AT, _ops.IN, _ops.ANY, _ops.LITERAL, _ops.NOT_LITERAL):
            raise ConfigError(
                f"the module rule {rule!r} has a {str(kind).lower()}, which module rules do not take; write it "
                "without references to groups, conditions and possessive repeats."
            )
        total += 1
    return total


def _accepts(kind: Any, value: Any, character: str, flags: int) -> bool:
    """Whether a part that takes one character takes this one."""
    if kind is _ops.ANY:
        return True
    members, negated = [(kind, value)], kind is _ops.NOT_LITERAL
    if kind is _ops.IN:
        negated = value[0][0] is _ops.NEGATE
        members = value[negated:]
    same = (character.lower(), character.upper()) if flags & re.IGNORECASE else (character,)
    return negated is not any(_holds(each, what, one, flags) for each, what in members for one in same)


def _holds(kind: Any, value: Any, character: str, flags: int) -> bool:
    if kind is _ops.CATEGORY:
        return re.match(_CATEGORIES[value], character, flags & re.ASCII) is not None
    low, high = value if kind is _ops.RANGE else (value, value)
    return bool(low <= ord(character) <= high)


def _bits(places: Sequence[int]) -> int:
    """An integer with a bit at each of the places, which ascend."""
    if not places:
        return 0
    row = bytearray(places[-1] // 8 + 1)
    for place in places:
        row[place // 8] |= 1 << place % 8
    return int.from_bytes(row, "little")
