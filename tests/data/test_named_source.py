"""Strings that name calibration data, and strings that were meant to."""

import csv

import pytest

from optimum_sab.calibration.samples.reading import read_samples
from optimum_sab.data.named_source import named_source
from optimum_sab.errors import SampleError


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for name in ("data.jsonl", "two_pic.jsonl", "notes.txt", "notes.csv", "notes.tsv", "dot.png", "data/train.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_files_and_datasets_are_told_apart(here):
    assert named_source("data.jsonl") == named_source(here / "data.jsonl").relative_to(here)
    assert named_source("~/data.jsonl") == here / "data.jsonl"
    assert named_source("data/train.jsonl").is_file()
    for name in ("owner/name", "owner/na.me-1:validation", "data/elsewhere"):
        assert named_source(name) == name


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data.jsnl", "the calibration file 'data.jsnl' does not exist; did you mean 'data.jsonl'?"),
        ("data.json", "the calibration file 'data.json' does not exist; did you mean 'data.jsonl'?"),
        (
            "data/trian.jsonl",
            "the calibration file 'data/trian.jsonl' does not exist; did you mean 'data/train.jsonl'?",
        ),
        ("dta/train.jsonl", "the calibration file 'dta/train.jsonl' does not exist, nor does its folder 'dta'"),
        ("/no/such/place", "the calibration file '/no/such/place' does not exist, nor does its folder '/no/such'"),
        ("./data/train", "the calibration file './data/train' does not exist; did you mean './data/train.jsonl'?"),
        ("nope.jsonl", "the calibration file 'nope.jsonl' does not exist; name one that is there"),
        ("~/other.jsonl", "the calibration file '~/other.jsonl' does not exist"),
        (r"C:\data\train", r"the calibration file 'C:\\data\\train' does not exist"),
        ("my data.jsonl", "the calibration file 'my data.jsonl' does not exist; did you mean 'data.jsonl'?"),
        ("missing.txt", "the calibration file 'missing.txt' does not exist"),
        ("a/b\0c", "the calibration file 'a/b\\x00c' does not exist"),
        ("data", "calibration='data' is a folder; name a file in it, such as 'train.jsonl'"),
        ("dot.png", """calibration='dot.png' is a picture; name it in a row, such as {"question": "What is it?", """),
        ("notes.txt", "calibration='notes.txt' is a file of a kind that is not read; the kinds are .jsonl"),
        ("notes.txt", 'a .jsonl file with a line such as {"text": "..."} for each text'),
        ("notes.txt", r"""such as calibration=open('notes.txt').read().split("\n\n")."""),
        ("notes.csv", """such as calibration=[row["text"] for row in csv.DictReader(open('notes.csv'))]."""),
        ("notes.tsv", r"""csv.DictReader(open('notes.tsv'), delimiter='\t')]."""),
        ("selff", "calibration='selff' is one text, which is no calibration data; did you mean 'self'? Otherwise give"),
        ("Builtin", "did you mean 'builtin'?"),
        (
            "One ordinary text.",
            "calibration='One ordinary text.' is one text, which is no calibration data; give a list",
        ),
        ("One text.\nOf two lines.", "is one text, which is no calibration data"),
        ("", "calibration='' is one text"),
        ("long " * 1000, "is one text, which is no calibration data"),
    ],
)
def test_a_string_that_names_nothing_is_an_error_and_no_sample(here, source, message):
    with pytest.raises(SampleError) as error:
        read_samples(source, 8, 0, True)
    assert message in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("name", "content"),
    [("notes.txt", "one\n\ntwo"), ("notes.csv", "text\none\ntwo\n"), ("notes.tsv", "text\tid\none\t1\ntwo\t2\n")],
)
def test_what_is_shown_for_another_file_reads_it(here, name, content):
    (here / name).write_text(content)
    with pytest.raises(SampleError) as error:
        named_source(name)
    shown = str(error.value).partition("such as calibration=")[2].removesuffix(".")
    assert eval(shown, {"csv": csv}) == ["one", "two"]


def test_a_path_is_never_a_text(here):
    for path in (here / "gone", here / "data", here / "notes.txt"):
        with pytest.raises(SampleError, match=r"does not exist|is a folder|is a file of a kind"):
            read_samples(path, 8, 0, True)


@pytest.mark.parametrize(
    ("place", "name", "message"),
    [
        ("passed", "", "is a folder; name a file."),
        ("passed", "dta.jsonl", "dta.jsonl' does not exist; name one that is there"),
        ("barred", "data.jsonl", "data.jsonl' may not be looked at; have the permissions of its folder changed"),
        ("barred", "below/data.jsonl", "data.jsonl' may not be looked at"),
    ],
)
def test_a_place_that_may_not_be_read_is_named(shut, place, name, message):
    source = str(getattr(shut, place) / name)
    with shut.entered(), pytest.raises(SampleError) as error:
        named_source(source)
    assert message in str(error.value) and source.rstrip("/") in str(error.value)


def test_a_file_in_a_folder_that_may_not_be_listed_is_found(shut):
    with shut.entered():
        assert named_source(shut.passed / "data.jsonl") == shut.passed / "data.jsonl"
