"""The search in all names at once finds what ``re`` finds, in a number of steps that is known beforehand."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_sab.errors import ConfigError
from optimum_sab.nn.patterns import NameSearch, parse, steps

LETTERS = "abAc.01_"
ATOMS = [
    *(
        "a",
        "b",
        r"\.",
        "0",
        ".",
        r"\d",
        r"\D",
        r"\w",
        r"\W",
        r"\s",
        r"\S",
        "[ab]",
        "[^a]",
        "[a-c1]",
        "[^.b-c]",
        "^",
        "$",
    ),
    *(r"\b", r"\B", r"\A", r"\Z", "(?=a)", "(?!b)", "(?<=a)", "(?<!b)", r"(?=.*a)", r"(?!.*b\.)", "(?<=b.)"),
]


def _larger(inner):
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{0,2}", "{1,}"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
        inner.map(lambda each: f"(?i:{each})"),
        inner.map(lambda each: f"({each})"),
    )


PATTERNS = st.recursive(st.sampled_from(ATOMS), _larger, max_leaves=8)
NAMES = st.lists(st.text(LETTERS, min_size=1, max_size=8), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(PATTERNS, NAMES)
def test_search_finds_what_re_finds(pattern, names):
    try:
        parse(pattern)
    except ConfigError:  # repeats of repeats of repeats, which are refused
        return
    assert NameSearch(names).find(pattern) == [name for name in names if re.search(pattern, name)]


@pytest.mark.parametrize("pattern", ["(?i)LAYERS", r"(?x) layers \. 0", "(?a)[\\w]+", "(?s:.)down"])
def test_search_takes_flags(pattern):
    names = ["model.layers.0.down", "down", "model.layers.1.up", "ä"]
    assert NameSearch(names).find(pattern) == [name for name in names if re.search(pattern, name)]


def test_search_in_no_names_finds_nothing():
    assert NameSearch([]).find(".*") == []


def followed(monkeypatch, pattern, names):
    """Steps that a search took."""
    taken = []
    original = NameSearch._step
    monkeypatch.setattr(NameSearch, "_step", lambda self, *args: taken.append(1) or original(self, *args))
    NameSearch(names).find(pattern)
    return len(taken)


@pytest.mark.parametrize("degree", [1, 2, 5, 10])
def test_wildcards_behind_each_other_cost_their_number(monkeypatch, degree):
    """`re` takes ten times as long for each more."""
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(100)]
    assert followed(monkeypatch, ".*" * degree + "X", names) <= degree * 35 + 1


@pytest.mark.parametrize("pattern", [".*.*.*X", "(.*a)*b", "(?:a|b|.)*!", "(?:[a-z.]+_)*0$", r"a{3,70}\."])
def test_no_search_takes_more_steps_than_were_counted(monkeypatch, pattern):
    names = ["model." + "a" * 80 + ".x", "b_" * 40]
    taken = followed(monkeypatch, pattern, names)
    assert 1 <= taken <= steps(pattern)
