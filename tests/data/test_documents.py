import random

import pytest
from PIL import ImageChops

from optimum_sab.data.documents import KINDS, number_sign, random_document, render
from optimum_sab.errors import ConfigError


@pytest.mark.parametrize("kind", KINDS)
def test_document_is_determined_by_the_generator(kind):
    assert random_document(random.Random(5), kind) == random_document(random.Random(5), kind)
    assert len({random_document(random.Random(seed), kind).text for seed in range(20)}) > 5


def test_document_refuses_an_unknown_kind():
    with pytest.raises(ConfigError, match="novel"):
        random_document(random.Random(0), "novel")


def test_document_draws_every_kind_by_itself():
    rng = random.Random(0)
    assert {random_document(rng).kind for _ in range(200)} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_document_answers_are_printed_or_follow_from_the_rows(kind):
    for seed in range(50):
        document = random_document(random.Random(seed), kind)
        assert document.questions
        for question in document.questions:
            if question.prompt.startswith("How many"):
                headings = {"receipt": 2, "table": 1}[kind]
                assert question.answer == str(len(document.rows) - headings)
            else:
                assert question.answer in document.text.replace("\n", " ")


def test_receipt_total_is_the_sum_of_its_prices():
    for seed in range(50):
        document = random_document(random.Random(seed), "receipt")
        prices = [row[1] for row in document.rows[1:-1]]
        cents = sum(round(float(price) * 100) for price in prices)
        assert document.rows[-1] == ("TOTAL", f"{cents // 100}.{cents % 100:02d}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [336, 448])
def test_render_keeps_all_ink_inside_the_page(kind, size):
    for seed in range(10):
        document = random_document(random.Random(seed), kind)
        image = render(document, size)
        assert (image.size, image.mode) == ((size, size), "RGB")
        page = image.copy()
        page.paste(document.paper, (0, 0, size, size))
        left, top, right, bottom = ImageChops.difference(image, page).getbbox()
        assert min(left, top) > 0
        assert max(right, bottom) < size


def test_render_shows_different_numbers_differently():
    pictures = {render(number_sign(number, random.Random(0)), 112).tobytes() for number in (16, 61, 616, 661)}
    assert len(pictures) == 4


def test_render_refuses_a_page_too_small_for_its_rows():
    with pytest.raises(ConfigError, match="size=20 is too small"):
        render(random_document(random.Random(0), "receipt"), 20)


def test_number_sign_asks_for_the_number_and_its_ends():
    answers = {each.prompt: each.answer for each in number_sign(407, random.Random(0)).questions}
    assert answers == {
        "What number is shown?": "407",
        "What is the first digit?": "4",
        "What is the last digit?": "7",
    }
