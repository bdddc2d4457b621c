"""The page of a real run in headless Chromium, where there is one."""

import re

import pytest

from optimum_sab.report.page import render
from tests.report.browser import CHROMIUM, measure, open_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
PHONE, DESK = 360, 1200


@pytest.fixture(scope="module")
def page(reported):
    return reported / "report.html"


def test_no_request_leaves_and_the_console_has_no_error(page, tmp_path):
    seen = open_page(page, tmp_path)
    assert seen.requests == []
    assert seen.console == []


def test_a_page_that_asks_and_complains_would_be_noticed(tmp_path):
    address = "http://127.0.0.1:9/picture.png"
    other = tmp_path / "other.html"
    other.write_text(f"<img src='{address}'><script>console.error('so it is')</script>")
    seen = open_page(other, tmp_path)
    assert seen.requests == [address]
    assert any("so it is" in line for line in seen.console)


def test_what_a_model_wrote_does_nothing_even_where_scripts_may_run(hostile, tmp_path):
    text, policies = re.subn("<meta http-equiv=.Content-Security-Policy[^>]*>", "", render(hostile))
    assert policies == 1
    (tmp_path / "hostile.html").write_text(text)
    seen = open_page(tmp_path / "hostile.html", tmp_path)
    assert seen.requests == [] and seen.console == []


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_is_no_wider_than_the_window_and_its_letters_can_be_read(page, tmp_path, width):
    found = measure(page, tmp_path, width)
    assert found["width"] <= width
    assert found["images"] == [336] * 3  # decoded
    assert len(found["letters"]) > 20 and min(found["letters"]) > 9


def test_the_page_is_dark_where_that_is_preferred(page, tmp_path):
    light, dark = measure(page, tmp_path, DESK), measure(page, tmp_path, DESK, dark=True)
    assert (light["background"], light["colour"]) == ("rgb(255, 255, 255)", "rgb(28, 28, 28)")
    assert (dark["background"], dark["colour"]) == ("rgb(22, 24, 26)", "rgb(230, 230, 227)")
