import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_sab.core.allocation import Level, allocate_levels, efficient_levels
from optimum_sab.errors import ConfigError

LEVELS = st.lists(
    st.builds(Level, st.integers(1, 30).map(float), st.integers(0, 50).map(float)), min_size=1, max_size=5
)


def total(layers, chosen):
    picked = [layers[name][index] for name, index in chosen.items()]
    return sum(level.bits for level in picked), sum(level.loss for level in picked)


def least_loss(layers, budget):
    """By trying everything."""
    losses = [
        sum(level.loss for level in choice)
        for choice in itertools.product(*layers.values())
        if sum(level.bits for level in choice) <= budget
    ]
    return min(losses, default=float("inf"))


@given(LEVELS)
def test_efficient_levels_are_convex_and_no_other_lies_below(levels):
    hull = efficient_levels(levels)
    gains = [
        (levels[a].loss - levels[b].loss) / (levels[b].bits - levels[a].bits)
        for a, b in zip(hull, hull[1:], strict=False)
    ]
    assert all(earlier > later > 0 for earlier, later in itertools.pairwise([float("inf"), *gains]))
    assert levels[hull[0]].bits == min(level.bits for level in levels)
    assert levels[hull[-1]].loss == min(level.loss for level in levels)
    for level in levels:
        for a, b in zip(hull, hull[1:], strict=False):
            if levels[a].bits <= level.bits <= levels[b].bits:
                share = (level.bits - levels[a].bits) / (levels[b].bits - levels[a].bits)
                line = levels[a].loss + share * (levels[b].loss - levels[a].loss)
                assert level.loss >= line - 1e-9


@given(st.dictionaries(st.sampled_from("abcd"), LEVELS, min_size=1), st.integers(0, 60))
def test_allocation_keeps_the_budget_and_is_within_one_step_of_the_optimum(layers, spare):
    budget = sum(min(level.bits for level in levels) for levels in layers.values()) + spare
    bits, loss = total(layers, allocate_levels(layers, budget))
    assert bits <= budget
    largest_step = max(max(x.bits for x in levels) - min(x.bits for x in levels) for levels in layers.values())
    assert loss <= least_loss(layers, budget - largest_step) + 1e-9


def test_allocation_gives_the_bits_to_the_layer_that_needs_them():
    cheap, dear = Level(10.0, 1.0), Level(20.0, 0.0)
    sensitive = [Level(10.0, 100.0), Level(20.0, 0.0)]
    assert allocate_levels({"dull": [cheap, dear], "sensitive": sensitive}, 30.0) == {"dull": 0, "sensitive": 1}


def test_allocation_names_a_budget_that_is_too_small():
    with pytest.raises(ConfigError, match="need 10 bits and the budget is 9"):
        allocate_levels({"a": [Level(10.0, 1.0)]}, 9.0)
