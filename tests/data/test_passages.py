from collections import Counter

import pytest

from optimum_sab.data.passages import IDEOGRAPHS, passages, text_samples, word_count
from optimum_sab.errors import ConfigError

LONGEST = 250


def dealt(samples: list[str]) -> Counter[str]:
    """How often each passage occurs in the samples."""
    return Counter({passage: sum(sample.count(passage) for sample in samples) for passage in passages()})


def test_passages_hold_enough_text_for_a_calibration_set():
    assert sum(word_count(passage) for passage in passages()) >= 14_000


def test_passages_are_of_similar_length():
    assert {passage: word_count(passage) for passage in passages() if not 60 <= word_count(passage) <= LONGEST} == {}


def test_passages_are_all_different():
    openings = Counter(passage[:60] for passage in passages())
    assert [opening for opening, times in openings.items() if times > 1] == []


def test_passages_hold_no_separator():
    assert [passage for passage in passages() if "----" in passage.splitlines()] == []


def test_passages_hold_other_scripts_in_a_small_share():
    foreign = sum(word_count(passage) for passage in passages() if len(IDEOGRAPHS.findall(passage)) > 50)
    assert 0 < foreign < 0.1 * sum(word_count(passage) for passage in passages())


@pytest.mark.parametrize(("text", "expected"), [("", 0), ("two words", 2), ("水水水水", 3), ("a\n\nb  c", 3)])
def test_word_count_counts_blanks_and_ideographs(text, expected):
    assert word_count(text) == expected


def test_text_samples_repeat_with_the_seed_and_differ_without():
    assert text_samples(5, seed=3) == text_samples(5, seed=3)
    assert text_samples(5, seed=3) != text_samples(5, seed=4)


def test_text_samples_of_a_larger_count_begin_with_those_of_a_smaller():
    assert text_samples(9, seed=1)[:4] == text_samples(4, seed=1)


def test_text_samples_stay_what_they_were():
    """A change here changes every model that is calibrated with the built-in texts: say so in the changelog."""
    assert [sample[:24] for sample in text_samples(3, seed=0)] == [
        "Caption: Two children bu",
        "Bought the 8-cup model f",
        "RECEIPT\nGREEN CORNER GRO",
    ]


@pytest.mark.parametrize("words", [1, 150, 400, 1000])
def test_text_samples_are_as_long_as_asked_for(words):
    for sample in text_samples(8, seed=0, words=words):
        assert words <= word_count(sample) < words + LONGEST


def test_text_samples_deal_every_passage_before_any_again():
    samples = text_samples(len(passages()), seed=2, words=1)
    assert sorted(samples) == sorted(passages())


def test_text_samples_go_on_when_the_passages_run_out():
    times = dealt(text_samples(3 * len(passages()), seed=2, words=1))
    assert set(times.values()) == {3}


@pytest.mark.parametrize(("count", "words", "value"), [(0, 400, "count=0"), (-2, 400, "count=-2"), (1, 0, "words=0")])
def test_text_samples_refuse_what_makes_no_text(count, words, value):
    with pytest.raises(ConfigError, match=value):
        text_samples(count, seed=0, words=words)
