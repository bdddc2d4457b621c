"""The page: nothing from outside, nothing that runs, everything escaped."""

import re
from html.parser import HTMLParser

import pytest

from optimum_sab.errors import ReportError
from optimum_sab.report.page import render

FETCHED = ("src", "srcset", "href", "xlink:href", "data", "poster", "action", "background")


class Page(HTMLParser):
    """Tags, and what each refers to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.addresses += [value for name, value in attributes if name in FETCHED]

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def check_self_contained(text):
    page = Page(text)
    assert [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "embed", "base", "form")] == []
    assert [name for _, a in page.tags for name in a if name.startswith("on")] == []
    assert page.addresses != []
    assert [each for each in page.addresses if not each.startswith(("data:image/png;base64,", "#", "data:,"))] == []
    assert re.findall(r"@import|url\((?!#)", text) == []
    assert {a.get("content") for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"} == {
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    }
    return page


def test_a_page_holds_everything_itself(document):
    check_self_contained(render(document))


def test_the_page_of_a_real_run_holds_everything_itself(reported):
    page = check_self_contained((reported / "report.html").read_text())
    assert len(page.all("img")) == 3
    assert str(reported.parent) not in (reported / "report.html").read_text()


def test_what_a_model_wrote_and_names_of_files_are_text(hostile):
    page = check_self_contained(render(hostile))
    assert "".join(page.text).count("<script>alert(1)</script>") > 10


def test_a_mark_that_turns_the_direction_of_writing_does_not_turn_our_words(document):
    document["about"]["class"] = "\u202eSome\u2067Model"
    text = "".join(Page(render(document)).text)
    assert "SomeModel" in text and not re.search("[\u202a-\u202e\u2066-\u2069]", text)


def test_pictures_have_alternatives_and_tables_captions(document):
    text = render(document)
    page = Page(text)
    assert all(a.get("alt") for a in page.all("img")) and len(page.all("img")) == 1
    charts = [a for a in page.all("div") if a.get("class") == "chart"]
    assert len(charts) == text.count("<svg") == 5
    assert all(a.get("role") == "img" and a.get("aria-label") for a in charts)
    told = re.sub(r", between [^;]*", "", charts[0]["aria-label"])
    assert told == "Error by block, over 3 blocks: text from 0.2 to 0.2; visual from 0.1 to 0.14"
    assert len(page.all("table")) == len(page.all("caption")) > 5
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")


def test_colours_are_the_pages_own_so_that_they_change_in_the_dark(document):
    svgs = re.findall(r"<svg.*?</svg>", render(document), re.DOTALL)
    colours = {each for svg in svgs for each in re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)}
    assert "var(--series0)" in colours and "currentColor" in colours
    assert [each for each in colours if each.startswith("#") and each != "#000000"] == []
    assert not any("#000000" in re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL) for svg in svgs)


@pytest.mark.parametrize(
    ("picture", "said"),
    [("http://127.0.0.1/x.png", "damaged"), ("PHN2Zz48L3N2Zz4=", "no PNG"), ("é", "damaged")],
)
def test_a_picture_that_is_none_is_refused(document, picture, said):
    document["examples"][1]["picture"] = picture
    with pytest.raises(ReportError, match=said):
        render(document)


def test_a_run_of_which_little_is_known_has_a_page(document):
    for name in ("temperature", "tuning", "calibration", "sizes"):
        document[name] = None
    document |= {"agreement": {}, "examples": [], "warnings": [], "no_examples": "Some cannot generate"}
    document["verdict"] |= {"level": "unknown", "kind": "", "reason": "it has no predictions to compare"}
    for block in document["blocks"]:
        block |= {"by_modality": {}, "drift": None, "significance": None, "error": None}
    text = check_self_contained(render(document)).text
    said = " ".join("".join(text).split())
    assert "Not shown: Some cannot generate." in said
    assert "was not compared" in said
    assert "It has no predictions to compare" in said


def test_a_name_with_dollars_is_no_formula(document):
    document["sizes"]["dense"] = {r"$\frac{1}{2}$ and $x": 10}
    assert r"$\frac{1}{2}$ and $x" in render(document)


def test_the_same_report_gives_the_same_page(document):
    assert render(document) == render(document)
