"""Names that are not ours are text in what we write as Markdown."""

import pytest

from optimum_sab.hf.hub.markdown import cell, code, plain


@pytest.mark.parametrize(
    ("text", "markup"),
    [
        ("Qwen2.5-VL_my_tune", "Qwen2.5-VL_my_tune"),
        ("_under_", r"\_under\_"),
        ("*a* [b](c) `d` <e> &amp; ~~f~~ $g$ # h", r"\*a\* \[b\](c) \`d\` \<e\> \&amp; \~\~f\~\~ \$g\$ \# h"),
        ("a\\*", r"a\\\*"),
        ("two\n\n# lines", r"two \# lines"),
    ],
)
def test_text_is_read_as_it_is(text, markup):
    assert plain(text) == markup


@pytest.mark.parametrize(
    ("text", "markup"),
    [("a", "`a`"), ("a`b", "``a`b``"), ("`a``b", "``` `a``b ```"), ("a\nb", "`a b`"), ("<b>*", "`<b>*`")],
)
def test_code_ends_where_the_text_ends(text, markup):
    assert code(text) == markup


def test_a_bar_ends_no_cell():
    assert cell("`a|b`") == r"`a\|b`"
    assert cell("a\n| b") == r"a \| b"
