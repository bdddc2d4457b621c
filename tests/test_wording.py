"""What messages have in common."""

import ast
from pathlib import Path

import pytest

import optimum_sab
from optimum_sab.wording import counted, did_you_mean, meant, nearest, other_names, page


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("defualt", ("default", "light"), "default"),
        ("base_plane", ("residual_planes", "base_planes"), "base_planes"),
        ("nope", ("two_pic",), None),
        ("texture", ("text",), "text"),
        ("", ("text",), None),
        ("text", (), None),
    ],
)
def test_nearest_is_near_or_none(word, known, expected):
    assert nearest(word, known) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        *(("fp16", "float16"), ("half", "float16"), ("bf16", "bfloat16"), ("fp32", "float32"), ("float", "float32")),
        *(
            ("2bit", "two-bit"),
            ("2-bit", "two-bit"),
            ("twobit", "two-bit"),
            ("Two Bit", "two-bit"),
            ("1bit", "default"),
        ),
    ],
)
def test_another_name_for_the_same_is_what_was_meant(word, expected):
    known = ("default", "two-bit", "float16", "bfloat16", "float32")
    assert meant(word, iter(known)) == [expected]
    assert did_you_mean(word, known) == f"; did you mean '{expected}'?"
    assert other_names(word, ("light",)) == []


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("samples", ["calibration_samples"]),  # by letters alone it would be examples
        ("num-samples", ["calibration_samples"]),
        ("seq_len", ["sequence_length"]),
        ("batch_size", ["block_size"]),
        ("planes", ["base_planes", "residual_planes"]),
        ("Base-Planes", ["base_planes"]),
        ("exampels", ["examples"]),
        ("calibratoin", []),
        ("model", []),  # code has half of its letters
        ("of-it", []),
        ("", []),
        ("_", []),
    ],
)
def test_whole_words_tell_more_than_letters(word, expected):
    known = (
        *("base_planes", "residual_planes", "block_size", "calibration_samples", "sequence_length"),
        *("examples", "code", "iterations"),
    )
    assert meant(word, known) == expected
    assert did_you_mean(word, known) == (f"; did you mean {' or '.join(map(repr, expected))}?" if expected else ".")


def test_sentence_ends_with_the_name_or_otherwise():
    assert did_you_mean("lihgt", ["light"]) == "; did you mean 'light'?"
    assert did_you_mean("magic", ["light"]) == "."
    assert did_you_mean("magic", ["light"], "; there is light.") == "; there is light."


def test_one_is_no_plural():
    assert [counted(count, "thread") for count in (0, 1, 2, 1024)] == [
        "0 threads",
        "1 thread",
        "2 threads",
        "1,024 threads",
    ]


def test_plural_of_its_own_is_taken():
    assert [counted(count, "process", "processes") for count in (1, 2)] == ["1 process", "2 processes"]


def docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value


def test_no_message_points_into_a_folder_that_is_not_installed():
    root, found = Path(optimum_sab.__file__).parent, []
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        silent = {id(each) for each in docstrings(tree)}
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and id(node) not in silent else None
            if isinstance(text, str) and "docs/" in text:
                found.append(f"{path.relative_to(root)}:{node.lineno}")
    assert found == []


def test_pages_that_messages_name_are_there():
    docs = Path(optimum_sab.__file__).parents[1] / "docs"
    if not docs.is_dir():
        pytest.skip("the package is installed without its documentation")
    named = set()
    for path in Path(optimum_sab.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "page":
                named |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    assert named >= {"models", "benchmarks", "large-models"}
    assert {name for name in named if not (docs / f"{name}.md").is_file()} == set()
    assert page("models") == "the page 'models' of optimum-sab's documentation"
