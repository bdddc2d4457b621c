"""`optimum-sab report`, and what `optimum-sab quantize` says at the end."""

import json
import shutil
import webbrowser

import pytest

from optimum_sab.cli.main import main
from optimum_sab.report.files import read_report


@pytest.fixture
def folder(reported, tmp_path):
    for name in ("report.json", "report.html"):
        shutil.copy(reported / name, tmp_path)
    return tmp_path


def test_report_makes_the_page_anew(folder, capsys):
    page = (folder / "report.html").read_text()
    (folder / "report.html").write_text("old")
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text() == page
    assert capsys.readouterr().out == f"{folder / 'report.html'}: {read_report(folder)['verdict']['words']}\n"


def test_report_as_json(folder, capsys):
    assert main(["report", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"report": str(folder / "report.html"), "verdict": read_report(folder)["verdict"]}


@pytest.mark.parametrize("browser", [True, False])
def test_report_opens_the_page_or_says_that_there_is_no_browser(folder, capsys, monkeypatch, browser):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or browser)
    assert main(["report", str(folder), "--open"]) == 0
    assert opened == [(folder / "report.html").as_uri()]
    assert ("no browser was found" in capsys.readouterr().out) is not browser


def test_report_of_a_checkpoint_without_one_is_an_error_in_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "sab"}}')
    assert main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "holds no report.json" in error and "optimum-sab quantize" in error


def test_quantize_writes_report_and_verdict(smallest_example, tmp_path, capsys):
    out = tmp_path / "packed"
    quick = ["--calibration-samples", "2", "--sequence-length", "32", "--iterations", "1", "--sweeps", "0"]
    out.mkdir()
    for stale in ("report.json", "report.html"):
        (out / stale).write_text("of another model")
    command = ["quantize", str(smallest_example), "--output", str(out), "--overwrite", "--no-examples", *quick]
    assert main([*command, "--allocation", "uniform", "--no-temperature-scaling"]) == 0
    found = read_report(out)
    assert found["examples"] == []
    last = capsys.readouterr().out.splitlines()[-1]
    verdict = found["verdict"]
    advice = verdict["advice"].replace("builtin_samples", "--builtin-samples")
    assert last == f"verdict: {verdict['words']}, judged on {verdict['kind']}. {advice} See {out / 'report.html'}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed"]
    assert "it was left out (--no-examples)" in " ".join((out / "report.html").read_text().split())


def test_the_run_says_what_the_report_says(reported):
    found = read_report(reported)
    assert len(found["examples"]) == 6
    assert found["calibration"]["count"] == 8 and found["calibration"]["with_pictures"] == 4
    assert found["verdict"]["level"] in ("close", "care", "far")
