"""Seconds are told from operations by speeds that were measured on the same kind of work."""

from dataclasses import replace

import pytest

from optimum_sab.calibration.plan import speeds as measuring
from optimum_sab.calibration.plan.duration import stage_times
from optimum_sab.calibration.plan.speeds import Speeds, measure_speeds
from optimum_sab.calibration.plan.trial import SolvingSpeeds

PRODUCTS, ENTRIES = 1.0e11, 1.0e8  # per second: of multiplications in a product, of entries that a search goes through
PARTS = ("cross-validation", "target", "refit", "alternating fit", "errors", "packing", "descent")


def _speeds(entries=ENTRIES):
    def solving(feedback):
        parts = dict.fromkeys(PARTS, PRODUCTS) | {"feedback": feedback}
        return SolvingSpeeds(parts, parts, 0.0)

    rates = ("forward", "one_row", "packed", "packed_row", "moments", "factorization", "attention", "elementwise")
    return Speeds(
        "cpu",
        (512, 2048),
        ((512, 2048),),
        **dict.fromkeys((*rates, "predictions", "reading"), PRODUCTS),
        factored_entry=0.0,
        solving={False: solving(PRODUCTS), True: solving(entries)},
        seconds=0.0,
    )


@pytest.fixture
def coded(work):
    """The same with a code, for the groups of which ``where`` is true."""

    def change(where):
        def group_of(group):
            return replace(group, settings=group.settings.replace(code="trellis16")) if where(group) else group

        blocks = [
            replace(block, groups=tuple(group_of(group) for group in block.groups)) for block in work.model.blocks
        ]
        return replace(work, model=replace(work.model, blocks=tuple(blocks)))

    return change


def _seconds(work, speeds, stage):
    return next(each.seconds for each in stage_times(work, speeds) if each.name == stage)


def test_the_search_of_a_code_is_counted_at_its_own_speed(work, coded):
    """Every entry of 64 rows of each member at four levels, and of everything once; a plain fit knows no search."""
    searched = coded(lambda _: True)
    members = sum(64 * group.members * group.in_features for group in work.model.groups)
    for stage, entries in (("allocation", 4 * members), ("blocks", sum(each.weights for each in work.model.groups))):
        fast, slow = (_seconds(searched, _speeds(speed), stage) for speed in (ENTRIES, ENTRIES / 2))
        assert slow - fast == pytest.approx(entries / ENTRIES)
        assert _seconds(work, _speeds(), stage) == _seconds(work, _speeds(ENTRIES / 2), stage) < fast


def test_a_code_of_some_linears_leaves_the_time_of_the_others(work, coded):
    """Of `dynamic`; each kind has the speed that it was measured at."""
    whole = {stage: _seconds(coded(lambda _: True), _speeds(), stage) for stage in ("allocation", "blocks")}
    for stage, all_of_it in whole.items():
        none = _seconds(work, _speeds(), stage)
        one = _seconds(coded(lambda group: group.at_residual), _speeds(), stage)
        rest = _seconds(coded(lambda group: not group.at_residual), _speeds(), stage)
        assert none < one < all_of_it and one + rest == pytest.approx(all_of_it + none)


def test_a_trial_is_run_of_each_kind_that_occurs(work, coded, monkeypatch):
    tried = []

    def time_solving(drawn, settings, *_):
        tried.append(settings)
        return SolvingSpeeds({}, {}, 0.0)

    monkeypatch.setattr(measuring, "time_solving", time_solving)
    monkeypatch.setattr(measuring, "time_factorization", lambda *_: (PRODUCTS, 0.0))
    monkeypatch.setattr(measuring.Timer, "rate", lambda *_: PRODUCTS)
    for given, codes in (
        (work, ["none"]),
        (coded(lambda _: True), ["trellis16"]),
        (coded(lambda group: group.members == 2), ["trellis16", "none"]),
    ):
        tried.clear()
        found = measure_speeds(given)
        assert [each.code for each in tried] == codes
        assert set(found.solving) == {code != "none" for code in codes}
