import random

import numpy as np
import pytest

from optimum_sab.data.held_out import is_reserved
from optimum_sab.eval.reader.signs import SIDE, WORDS, draw_sign, random_words


def signs(count, seed=0):
    rng = random.Random(seed)
    return [draw_sign(random_words(rng, reserved=False), rng) for _ in range(count)]


def test_words_are_lowercase_and_distinct():
    assert len(set(WORDS)) == len(WORDS)
    assert all(word.isascii() and word.isalpha() and word.islower() for word in WORDS)


@pytest.mark.parametrize("reserved", [True, False])
def test_random_words_come_from_the_wanted_side(reserved):
    rng = random.Random(0)
    assert all(is_reserved(" ".join(random_words(rng, reserved))) == reserved for _ in range(200))


def test_draw_sign_fits_every_word_into_the_picture():
    for sign in signs(300):
        assert sign.image.size == (SIDE, SIDE)
        for edges, (top, bottom) in zip(sign.letters, sign.lines, strict=True):
            assert edges[0] >= 0
            assert edges[-1] <= SIDE
            assert top >= 0
            assert bottom <= SIDE + 2


def test_draw_sign_says_where_the_letters_are():
    """Ink is found in every letter's box, and none outside the lines."""
    for sign in signs(100):
        pixels = np.asarray(sign.image).astype(int)
        inked = (pixels != pixels[0, 0]).any(-1)
        outside = inked.copy()
        for word, edges, (top, bottom) in zip(sign.words, sign.letters, sign.lines, strict=True):
            assert len(edges) == len(word) + 1
            for left, right in zip(edges, edges[1:], strict=False):
                assert inked[int(top) : int(bottom) + 1, int(left) : int(right) + 1].any()
            outside[max(0, int(top) - 1) : int(bottom) + 5, max(0, int(edges[0]) - 2) : int(edges[-1]) + 3] = False
        assert not outside.any()


def test_draw_sign_can_be_read_apart_from_its_paper():
    for sign in signs(100):
        colours = np.asarray(sign.image.convert("L")).astype(int)
        assert colours.max() - colours.min() > 60
