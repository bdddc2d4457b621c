import random

import pytest

from optimum_sab.data.held_out import RESERVED_MODULUS, draw, is_reserved


def test_about_one_key_in_the_modulus_is_reserved():
    share = sum(is_reserved(str(number)) for number in range(10000)) / 10000
    assert share == pytest.approx(1 / RESERVED_MODULUS, rel=0.15)


@pytest.mark.parametrize("reserved", [True, False])
def test_draw_gives_everything_of_the_wanted_side_and_nothing_else(reserved):
    rng = random.Random(0)
    drawn = {draw(rng, lambda rng: rng.randrange(50), str, reserved) for _ in range(2000)}
    assert drawn == {number for number in range(50) if is_reserved(str(number)) == reserved}
