"""How outcomes are shown, and what the command says in the end."""

import json
import re
from pathlib import Path

import pytest
import transformers

from optimum_sab.bench.coverage import isolation
from optimum_sab.bench.coverage.families import all_families
from optimum_sab.bench.coverage.outcome import (
    FAILED,
    NOT_BUILT,
    REFUSED,
    WORKS,
    FamiliesFailedError,
    Outcome,
    check_outcomes,
    first_line,
    totals,
)
from optimum_sab.bench.coverage.table import as_json, as_markdown, row, total_line
from optimum_sab.cli.main import main

GOOD = Outcome("llava", WORKS, pictures=8, share=0.994, seconds=2.5)
BAD = Outcome("git", FAILED, "quantize", "ValueError: a | b <c>", pictures=8, seconds=1.0)
NEVER = Outcome("pix2struct", REFUSED, "quantize", "SampleError: no ids", pictures=12)
ABSENT = Outcome("fast_vlm", NOT_BUILT, "build", "ImportError: timm", left_out=("generate",))


def test_totals_count_each_outcome():
    assert totals([GOOD, GOOD, BAD, ABSENT]) == {WORKS: 2, REFUSED: 0, FAILED: 1, NOT_BUILT: 1}
    assert total_line([GOOD, BAD]).startswith("2 families: 1 works, 0 refused, 1 failed, 0 not built")


def test_row_holds_what_came_of_it():
    assert row(GOOD).split() == ["llava", "works", "yes", "no", "0.99", "2.5"]
    assert row(BAD).endswith("quantize: ValueError: a | b <c>")
    assert row(ABSENT).endswith("build: ImportError: timm; the dense model cannot generate here")


def test_markdown_is_one_table_with_versions():
    lines = as_markdown([GOOD, BAD]).splitlines()
    assert f"Transformers {transformers.__version__}" in lines[0]
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4
    assert {line.count("|") - line.count("\\|") for line in table} == {8}
    assert table[-1].endswith("quantize: ValueError: a \\| b &lt;c> |")


def test_json_holds_rows_totals_and_versions():
    found = json.loads(json.dumps(as_json([GOOD, NEVER])))
    assert found["totals"] == {WORKS: 1, REFUSED: 1, FAILED: 0, NOT_BUILT: 0}
    assert found["environment"]["transformers"] == transformers.__version__
    assert found["rows"][0]["share"] == 0.994
    assert found["rows"][1]["reason"] == "SampleError: no ids"


def test_only_a_failure_is_an_error():
    check_outcomes([GOOD, NEVER, ABSENT])
    with pytest.raises(FamiliesFailedError, match="1 of 2 families failed: git"):
        check_outcomes([GOOD, BAD])


def test_first_line_is_the_class_and_the_first_words():
    assert first_line(ValueError("\n one\ntwo")) == "ValueError: one"
    assert first_line(MemoryError()) == "MemoryError"


@pytest.mark.parametrize(("outcome", "status"), [(GOOD, 0), (BAD, 1)])
@pytest.mark.parametrize("form", ["rows", "--json", "--markdown"])
def test_command_shows_outcomes_and_ends_with_their_status(monkeypatch, capsys, outcome, status, form):
    asked = []

    def try_families(families, limits):
        asked.append((families, limits))
        return iter([outcome])

    monkeypatch.setattr(isolation, "try_families", try_families)
    options = [] if form == "rows" else [form]
    assert main(["bench", "coverage", outcome.family, "--jobs", "2", "--timeout", "7", *options]) == status
    (families, limits), captured = asked[0], capsys.readouterr()
    assert [family.name for family in families] == [outcome.family]
    assert (limits.jobs, limits.seconds) == (2, 7)
    assert outcome.family in captured.out
    assert ("families failed" in captured.err) == bool(status)
    if form == "--json":
        assert json.loads(captured.out)["rows"][0]["outcome"] == outcome.outcome


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24), reason="the page is of the newest line"
)
def test_page_has_a_row_for_every_family():
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| (works|refused|failed|not built) \|", page, re.MULTILINE)
    assert [name for name, _ in rows] == [family.name for family in all_families()]


def test_command_refuses_a_family_that_does_not_exist(capsys):
    assert main(["bench", "coverage", "llavva"]) == 1
    assert "did you mean 'llava'" in capsys.readouterr().err
