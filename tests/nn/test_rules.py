"""Module rules: what they cover, that names are looked up, and that no rule of a checkpoint makes loading long."""

import re

import pytest

from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError
from optimum_sab.nn.decoder import BlockLists
from optimum_sab.nn.patterns import NameSearch
from optimum_sab.nn.rules import check_rules, covered_by, found_in, overridden, rules_for

PREFIX = "model.language_model.layers"
LISTS = BlockLists((PREFIX,))
SMALL = LayerSettings(block_size=32)
ONE, TWO = {"base_planes": 1}, {"base_planes": 2}


def linears(blocks, prefix=PREFIX, parts=("self_attn.q_proj", "mlp.gate", "mlp.gate_proj", "mlp.down_proj")):
    start = f"{prefix}." if prefix else ""
    return [f"{start}{i}.{part}" for i in range(blocks) for part in parts]


@pytest.fixture
def searched(monkeypatch):
    """What is searched with an engine for expressions, rather than looked up."""
    calls = []
    original = NameSearch.find
    monkeypatch.setattr(NameSearch, "find", lambda self, pattern: calls.append(pattern) or original(self, pattern))
    return calls


@pytest.mark.parametrize(
    ("rule", "name", "expected"),
    [
        ("down_proj", "model.layers.0.mlp.down_proj", True),
        ("mlp.down_proj", "model.layers.0.mlp.down_proj", True),
        ("layers.0", "model.layers.0.mlp.down_proj", True),
        ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj", True),
        ("model", "model.layers.0.mlp.down_proj", True),
        ("lm_head", "lm_head", True),
        ("layers.1", "model.layers.10.mlp.down_proj", False),
        ("down", "model.layers.0.mlp.down_proj", False),
        ("proj", "model.layers.0.mlp.down_proj", False),
        ("layers.down_proj", "model.layers.0.mlp.down_proj", False),
        ("layers.*.mlp", "model.layers.0.mlp.down_proj", False),
        ("layersx0", "model.layers.0", False),
        ("", "model.layers.0", False),
        (r"re:layers\.\d+\.mlp", "model.layers.10.mlp.down_proj", True),
        ("re:down", "model.layers.0.mlp.down_proj", True),
        ("re:^down", "model.layers.0.mlp.down_proj", False),
        (r"re:layers\.1\.", "model.layers.10.mlp", False),
    ],
)
def test_rule_covers_whole_dotted_parts_or_what_an_expression_is_found_in(rule, name, expected):
    assert covered_by([rule], [name]) == {rule: [name] if expected else []}


def test_rules_cover_each_what_they_cover_alone():
    names = [*linears(12), "lm_head"]
    rules = ["down_proj", "layers.1", "re:gate$", "lm_head", "layers.11.mlp.gate", "nothing", "re:^model.*0.*q"]
    assert covered_by(rules, names) == {rule: covered_by([rule], names)[rule] for rule in rules}
    assert covered_by(rules, names)["layers.1"] == [n for n in names if ".layers.1." in n]


@pytest.mark.parametrize(
    "rule",
    [
        "down_proj",
        "proj",
        "layers.1.",
        r"layers\.1\.",
        r"layers\.0\.mlp\.gate",
        r"^model\..*q_proj$",
        "layers.0.mlp.gate",
        "layers.0.mlp.gate_proj",
        f"{PREFIX}.3.mlp.down_proj",
        r"(?:^|\.)layers\.(?:0\.mlp\.gate|11\.self_attn\.q_proj|99\.mlp\.gate)$",
        r"(?:^|\.)blocks\.(?:0\.mlp\.gate)$",
        r"^(?:0\.mlp\.gate)$",
        r"(?!.*layers\.[0-9]\.).*q_proj",
        "(?i)DOWN",
    ],
)
def test_dynamic_rule_is_found_where_re_finds_it(rule):
    """The same as when each was a regular expression, so what was stored reads as it did."""
    for prefix in (PREFIX, "layers", ""):
        names = linears(12, prefix)
        wanted = {name: [rule] if re.search(rule, name) else [] for name in names}
        assert found_in([rule], names, BlockLists((prefix,))) == wanted


def test_rules_apply_in_their_order_whether_looked_up_or_searched():
    names = linears(2)
    dynamic = {
        "down_proj": {"base_planes": 3},
        "layers.1.mlp.down_proj": {"base_planes": 2},
        r"1\.mlp": {"damping": 0.2},
    }
    own, used = overridden(dict.fromkeys(names, SMALL), dynamic, LISTS)
    assert own[f"{PREFIX}.0.mlp.down_proj"] == SMALL.replace(base_planes=3)
    assert own[f"{PREFIX}.1.mlp.down_proj"] == SMALL.replace(base_planes=2, damping=0.2)
    backwards, _ = overridden(dict.fromkeys(names, SMALL), dict(reversed(dynamic.items())), LISTS)
    assert backwards[f"{PREFIX}.1.mlp.down_proj"] == SMALL.replace(base_planes=3, damping=0.2)
    assert used == set(dynamic)


# --- names that are written down ---


@pytest.mark.parametrize("prefix", [PREFIX, "layers", "h", ""])
def test_written_rules_are_names_and_find_one_linear_each(prefix):
    names = linears(12, prefix)
    keys = rules_for(names, names, BlockLists((prefix,)))
    assert found_in(keys.values(), names, BlockLists((prefix,))) == {name: [keys[name]] for name in names}
    for name, key in keys.items():  # in a release that searches them, too
        assert [each for each in names if re.search(key, each)] == [name]
    if prefix:
        last = prefix.rpartition(".")[2]
        assert keys[f"{prefix}.3.mlp.down_proj"] == f"{last}.3.mlp.down_proj"
        assert keys[f"{prefix}.3.mlp.gate"] == rf"(?:^|\.)(?:{last}\.3\.mlp\.gate)$"  # it is found in gate_proj


def test_ten_thousand_names_are_looked_up_and_not_searched(searched):
    names = linears(2500)
    dynamic = {
        key: ONE if i % 2 else TWO for i, key in enumerate(n.removeprefix("model.language_model.") for n in names)
    }
    own, used = overridden(dict.fromkeys(names, SMALL), dynamic, LISTS)
    assert len(used) == 10_000 and searched == []
    assert {s.base_planes for s in own.values()} == {1, 2}
    left = [n.removeprefix("model.language_model.") for n in names]
    assert covered_by(left, names) == {rule: [name] for rule, name in zip(left, names, strict=True)}
    assert searched == []


def test_a_list_of_names_as_it_was_stored_is_looked_up(searched):
    names = linears(600)
    listed = "|".join(re.escape(n.removeprefix(f"{PREFIX}.")) for n in names[::2])
    rule = rf"(?:^|\.)layers\.(?:{listed})$"
    assert len(rule) > 10_000
    assert found_in([rule], names, LISTS) == {n: [rule] if i % 2 == 0 else [] for i, n in enumerate(names)}
    assert searched == []


def test_patterns_are_searched_once_for_all_names(searched):
    found_in(["down", r"layers\.\d+\."], linears(50), LISTS)
    covered_by(["re:down", "q_proj"], linears(50))
    assert searched == ["down", r"layers\.\d+\.", "down"]


# --- bounds ---


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ([f"layers\\.{i}\\." for i in range(1001)], "1001 regular expressions as module rules, more than 1000"),
        (["x" * 500 + "+" + "y" * 501], "1002 characters, more than the 1000"),
        (["((a*)*)*b"], r"'(re:)?\(\(a\*\)\*\)\*b' takes .* steps to search, more than the"),
        ([f"(?:(?:a|b)*c){{100}}{i}" for i in range(30)], "the module rules take .* steps to search, more than 250000"),
        (["(a)\\1"], "has a groupref"),
        (["(" * 60 + "a" + ")" * 60], "more than 40 groups inside each other"),
        (["(" * 500 + "a" + ")" * 500], "module rule"),
        (["("], "is no regular expression: missing"),
        (["a{99999999999999999999}"], "is no regular expression: the repetition number is too large"),
        ([3], "the module rule 3 is no text"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_rules_that_take_long_are_refused_by_name(rules, named):
    with pytest.raises(ConfigError, match=named):
        check_rules((), rules)
    if isinstance(rules[0], str):
        with pytest.raises(ConfigError, match=named):
            check_rules([f"re:{rule}" for rule in rules], ())


def test_a_bad_expression_is_shown_as_it_was_given_and_what_mends_it():
    said = r"is no regular expression: missing \), unterminated subpattern at character {}; put a backslash .* '\\\(' "
    with pytest.raises(ConfigError, match=r"the module rule 're:v_proj\(' " + said.format(10) + ".* without 're:'\\.$"):
        check_rules(["re:v_proj("], ())
    with pytest.raises(
        ConfigError, match=r"the module rule 'v_proj\(' " + said.format(7) + ".* or write a plain name\\.$"
    ):
        check_rules((), ["v_proj("])
    check_rules([r"re:v_proj\(", "v_proj"], [r"v_proj\("])


@pytest.mark.parametrize(
    "rule", ["((a*)*)*b", "x+" * 501, "(" * 60 + "a" + ")" * 60, r"(a)\1", "a{99999999999999999999}"]
)
def test_whatever_is_wrong_with_an_expression_shows_the_rule_as_it_was_given(rule):
    with pytest.raises(ConfigError, match=re.escape(f"the module rule {f're:{rule}'[:57]!r}"[:-1])):
        check_rules([f"re:{rule}"], ())


def test_what_users_write_is_within_the_bounds():
    harmless = [
        r"layers\.\d+\.mlp",
        ".*down_proj$",
        r"(?:\w+\.)*(?:q|k|v)_proj",
        r"^(?!.*layers\.0\.).*",
        "[0-9]+.*[0-9]+",
    ]
    check_rules([f"re:{rule}" for rule in harmless * 20], [f"{rule}{i}" for rule in harmless for i in range(10)])


def test_refused_rules_have_not_been_searched(searched):
    with pytest.raises(ConfigError):
        found_in(["down", "((a*)*)*b"], linears(2), LISTS)
    assert searched == []
