"""Module rules: which names a list of them covers. Names are looked up, patterns searched, each once for all names.

``modules_to_not_convert`` holds runs of whole dotted parts, or regular expressions behind ``re:``. Keys of ``dynamic``
are regular expressions; one that is the whole name of a linear, from the decoder's block list on, is found without
searching. That is how the choice of the allocation is written down, a rule for each linear.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError
from optimum_sab.nn.decoder import BlockLists
from optimum_sab.nn.patterns import PLAIN, NameSearch, steps
from optimum_sab.wording import nearest

PATTERNS = 1000  # of a configuration
STEPS = 250_000  # to search all of them
_EXPRESSION = "re:"  # stands before an expression in ``modules_to_not_convert``
# what the allocation wrote up to release 0.1, and writes for a name that is found in another one
_LISTED = re.compile(r"(\^|\(\?:\^\|\\\.\))((?:\w|\\[.-])+\\\.)?\(\?:((?:\w|\\[.-]|\|)+)\)\$")


def check_rules(modules_to_not_convert: Iterable[str], dynamic: Iterable[str]) -> None:
    """Refuse what cannot be searched in reasonable time, before there are names.

    Raises:
        ConfigError: a rule is no text or no regular expression, has a construct that is not searched
            (`patterns.parse`), or there are more than `PATTERNS`, or more than `STEPS` to search them all.
    """
    modules_to_not_convert, dynamic = list(modules_to_not_convert), list(dynamic)
    for rule in (*modules_to_not_convert, *dynamic):
        if not isinstance(rule, str):
            raise ConfigError(f"the module rule {rule!r} is no text; write names, or regular expressions, in quotes.")
    patterns = [(_EXPRESSION, rule.removeprefix(_EXPRESSION)) for rule in modules_to_not_convert if is_expression(rule)]
    patterns += [("", rule) for rule in dynamic if not (PLAIN.fullmatch(rule) or _LISTED.fullmatch(rule))]
    if len(patterns) > PATTERNS:
        raise ConfigError(
            f"the configuration has {len(patterns)} regular expressions as module rules, more than {PATTERNS}; one "
            "that covers several modules takes the place of many, and whole module names are not counted."
        )
    costs = {pattern: steps(pattern, prefix) for prefix, pattern in patterns}
    if sum(costs.values()) > STEPS:
        costliest = max(costs, key=lambda pattern: costs[pattern])
        worst = next(prefix + pattern for prefix, pattern in patterns if pattern == costliest)
        raise ConfigError(
            f"the module rules take {sum(costs.values())} steps to search, more than {STEPS}; the costliest is "
            f"{worst!r}. Use fewer or simpler regular expressions; whole module names are not counted."
        )


def covered_by(rules: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """The names that each rule of ``modules_to_not_convert`` covers.

    A rule is a run of whole dotted parts anywhere in the name ("down_proj", "layers.0", the full name), or a regular
    expression behind ``re:`` that is searched in the name.

    Raises:
        ConfigError: see `check_rules`.
    """
    check_rules(rules, ())
    covered: dict[str, list[str]] = {rule: [] for rule in rules}
    runs: dict[str, set[int]] = {}  # first part -> numbers of parts
    search = NameSearch(names)
    for rule in covered:
        if is_expression(rule):
            covered[rule] = search.find(rule.removeprefix(_EXPRESSION))
        else:
            parts = rule.split(".")
            runs.setdefault(parts[0], set()).add(len(parts))
    for name in names if runs else ():
        parts = name.split(".")
        found = {
            ".".join(parts[start : start + count])
            for start, part in enumerate(parts)
            for count in runs.get(part, ())
            if start + count <= len(parts)
        }
        for rule in found & covered.keys():
            covered[rule].append(name)
    return covered


def is_expression(rule: str) -> bool:
    """Whether a rule of ``modules_to_not_convert`` is a regular expression, rather than dotted parts."""
    return rule.startswith(_EXPRESSION)


def nearest_rule(rule: str, names: Sequence[str]) -> str | None:
    """What a rule that covers nothing was meant to be: a run of parts with its numbers in one of the names, or None.

    Args:
        rule: of ``modules_to_not_convert`` or ``dynamic``; for one that is more than plain parts there is none.
        names: of modules.
    """
    if not PLAIN.fullmatch(rule):
        return None
    count, numbers = rule.count(".") + 1, _numbers(rule.split("."))
    runs: dict[str, None] = {}  # in the order of the names, each once
    for name in names:
        parts = name.split(".")
        for start in range(len(parts) - count + 1):
            if _numbers(parts[start : start + count]) == numbers:  # a block that is not there was not another one
                runs[".".join(parts[start : start + count])] = None
    return nearest(rule, runs)


def _numbers(parts: Sequence[str]) -> list[str]:
    return [part for part in parts if part.isdigit()]


def found_in(rules: Iterable[str], names: Sequence[str], lists: BlockLists) -> dict[str, list[str]]:
    """The keys of ``dynamic`` that are found in each name, in their order.

    Args:
        rules: regular expressions.
        names: of linears in the decoder blocks.
        lists: that the blocks stand in.

    Raises:
        ConfigError: see `check_rules`.
    """
    rules = list(rules)
    check_rules((), rules)
    found: dict[str, list[str]] = {name: [] for name in names}
    search, index = NameSearch(names), _WholeNames(names, lists)
    for rule in rules:
        known = index.look_up(rule)
        for name in search.find(rule) if known is None else known:
            found[name].append(rule)
    return found


def overridden(
    settings: Mapping[str, LayerSettings], dynamic: Mapping[str, Mapping[str, Any]], lists: BlockLists
) -> tuple[dict[str, LayerSettings], set[str]]:
    """Settings by name with what the rules found in each name change, in their order; and the rules that were found."""
    found = found_in(dynamic, list(settings), lists)
    made: dict[tuple[LayerSettings, str], LayerSettings] = {}  # many rules say the same
    own = {}
    for name, each in settings.items():
        for rule in found[name]:
            key = (each, repr(dynamic[rule]))
            if key not in made:
                made[key] = each.replace(**dynamic[rule])
            each = made[key]
        own[name] = each
    return own, {rule for each in found.values() for rule in each}


def rules_for(names: Sequence[str], among: Sequence[str], lists: BlockLists) -> dict[str, str]:
    """A key of ``dynamic`` for each name that is found in no other, to be written down.

    Args:
        names: of linears.
        among: names of all linears, these too.
        lists: that the decoder blocks stand in.

    Returns:
        By name: the name from the block list on; an anchored expression where that would be found in another name too.
    """
    plain = {name: name[lists.start :] for name in names}
    found = found_in(plain.values(), among, lists)
    count: dict[str, int] = {}
    for each in found.values():
        for rule in each:
            count[rule] = count.get(rule, 0) + 1
    head = "^" if lists.bare else r"(?:^|\.)"
    return {
        name: rule if PLAIN.fullmatch(rule) and count.get(rule) == 1 else f"{head}(?:{_escaped(rule)})$"
        for name, rule in plain.items()
    }


def _escaped(name: str) -> str:
    return re.sub(r"[^\w]", lambda match: "\\" + match[0], name)


class _WholeNames:
    """Rules that are names of linears, from the block list on, or lists of such."""

    def __init__(self, names: Sequence[str], lists: BlockLists) -> None:
        self._anchored = lists.bare  # then names begin with a number, which is found in longer numbers
        self._names = {name[lists.start :]: name for name in names}
        self._sorted = sorted(self._names)
        self._above = f"{lists.above}." if lists.above else ""

    def look_up(self, rule: str) -> list[str] | None:
        """What the rule is found in; None where it has to be searched."""
        if PLAIN.fullmatch(rule):
            rule = rule.removeprefix(self._above)
            if rule not in self._names or self._anchored:
                return None
            found, place = [], bisect_left(self._sorted, rule)
            while place < len(self._sorted) and self._sorted[place].startswith(rule):
                found.append(self._names[self._sorted[place]])
                place += 1
            return found
        listed = _LISTED.fullmatch(rule)
        if listed is None:
            return None
        _, first, rest = listed.groups()
        begins = (first or "").replace("\\", "")
        wanted = [begins + each for each in rest.replace("\\", "").split("|")]
        return [self._names[each] for each in wanted if each in self._names]
