"""Who trains and who judges."""

import pytest

from optimum_sab.calibration.refine.holdout import split_samples


@pytest.mark.parametrize(("count", "judges"), [(2, 1), (9, 1), (10, 1), (19, 1), (20, 2), (512, 51)])
def test_split_holds_out_a_tenth_and_shares_nothing(count, judges):
    split = split_samples(count)
    assert len(split.judge) == judges
    assert sorted(split.train + split.judge) == list(range(count))


def test_split_of_a_lone_sample_uses_it_for_both():
    assert split_samples(1).train == split_samples(1).judge == (0,)
