"""report.json and report.html as files."""

import json
import os
import sys

import pytest

from optimum_sab.errors import OutputError, ReportError, SABWarning
from optimum_sab.report.files import read_report, write_page, write_report


def test_both_files_are_written_and_the_page_is_made_again_from_the_first(document, tmp_path):
    write_report(tmp_path, document)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]  # no partial file is left
    assert read_report(tmp_path) == document
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    assert write_page(tmp_path).read_text() == page


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_without_the_packages_of_the_page_the_json_is_written_and_a_line_says_what_is_needed(
    document, tmp_path, monkeypatch, missing
):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.warns(SABWarning, match=r"report\.json is written, report\.html is not: .*optimum-sab\[report\]"):
        write_report(tmp_path, document)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert read_report(tmp_path) == document


PACKED = '{"quantization_config": {"quant_method": "sab"}}'


def test_a_checkpoint_without_report_is_a_named_error(tmp_path):
    (tmp_path / "config.json").write_text(PACKED)
    with pytest.raises(ReportError, match=r"holds no report\.json.*hf_quantizer\.report\.save"):
        write_page(tmp_path)
    with pytest.raises(ReportError, match="is no folder"):
        write_page(tmp_path / "nowhere")


def test_a_report_that_another_model_has_left_is_a_named_error(tmp_path, document):
    agreement = {"text": {"kl": 0.32676, "top1": 0.5}, "pictures": {"kl": 0.1, "top1": 0.9}}
    write_report(tmp_path, {**document, "agreement": agreement})
    stored = {"text": {"kl": 0.3268, "top1": 0.5}, "pictures": {"kl": 0.1, "top1": 0.9}}

    def save(agreement):
        own = {"quant_method": "sab", "measured": {"agreement": agreement}}
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": own}))

    save(stored)
    assert write_page(tmp_path) == tmp_path / "report.html"
    save({**stored, "text": {"kl": 0.41, "top1": 0.5}})
    with pytest.raises(ReportError, match=r"is of another model than the one that was saved there since"):
        write_page(tmp_path)


@pytest.mark.parametrize(
    "config", [None, "{}", "[]", "{", '{"quantization_config": {"quant_method": "gptq"}}', '{"quantization_config": 1}']
)
def test_a_folder_that_holds_no_packed_checkpoint_has_no_report_either(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ReportError, match="holds no packed checkpoint, of which alone there are reports"):
        write_page(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "report_version None"),
        ('{"report_version": 99}', "report_version 99, and this release reads 1"),
    ],
)
def test_a_report_that_cannot_be_read_is_a_named_error(tmp_path, text, said):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ReportError, match=said):
        read_report(tmp_path)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("blocks", 3),
        ("blocks", [{"index": 0}]),
        ("stages", [{"name": "x", "seconds": "long"}]),
        ("verdict", None),
        ("agreement", {"text": {"kl": "much"}}),
        ("examples", [{"prompt": "x"}]),
        ("sizes", {"packed": 1}),
    ],
)
def test_a_report_that_holds_something_else_is_a_named_error(document, tmp_path, section, value):
    (tmp_path / "report.json").write_text(json.dumps({**document, section: value}))
    with pytest.raises(ReportError, match="does not hold what this release writes"):
        write_page(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_section_that_is_missing_is_a_named_error(document, tmp_path):
    del document["warnings"]
    (tmp_path / "report.json").write_text(json.dumps(document))
    with pytest.raises(ReportError, match="warnings"):
        write_page(tmp_path)


def test_a_page_that_cannot_be_written_names_the_folder(document, tmp_path):
    write_report(tmp_path, document)
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"copy report\.json"):
        write_page(tmp_path)


@pytest.mark.parametrize("value", [float("inf"), 10**400])
def test_a_number_that_is_too_large_is_a_named_error(document, tmp_path, value):
    document["stages"][0]["seconds"] = value
    (tmp_path / "report.json").write_text(json.dumps(document))
    with pytest.raises(ReportError, match="does not hold what this release writes"):
        write_page(tmp_path)


def test_a_name_that_is_no_unicode_is_written(document, tmp_path):
    document["about"]["model"] = os.fsdecode(b"model-\xff")
    write_report(tmp_path, document)
    assert read_report(tmp_path) == document
    assert "model-\\udcff" in write_page(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a pipe", "a folder"])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, make):
    make(tmp_path / "report.json")
    with pytest.raises(ReportError, match=r"report\.json in .* is no file"):
        read_report(tmp_path)
