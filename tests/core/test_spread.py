import pytest

from optimum_sab.core.spread import spread

MOST = 16


@pytest.mark.parametrize("count", [1, 5, MOST, MOST + 1, 2 * MOST - 1, 68, 1000])
def test_samples_are_spread(count):
    chosen = spread(count, MOST)
    assert len(chosen) == min(count, MOST) == len(set(chosen))
    assert chosen[0] == 0
    assert chosen[-1] < count
    assert max(b - a for a, b in zip(chosen, [*chosen[1:], count], strict=True)) <= -(-count // len(chosen))
