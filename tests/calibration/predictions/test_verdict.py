"""What is said of a finished model in a word."""

import math

import pytest

from optimum_sab.calibration.predictions.agreement import Agreement
from optimum_sab.calibration.predictions.verdict import CARE, CLOSE, FAR, LIMITS, UNKNOWN, forgotten, judge


@pytest.mark.parametrize(
    ("kind", "kl", "top1", "level"),
    [
        ("text", 0.04, 0.9, CLOSE),
        ("text", 0.1, 0.75, CLOSE),
        ("text", 0.1, 0.74, CARE),
        ("pictures", 0.1, 0.79, CARE),
        ("text", 0.11, 0.95, CARE),
        ("text", 1.0, 0.4, CARE),
        ("text", 1.01, 0.9, FAR),
        ("pictures", 0.09, 0.857, CLOSE),
        ("pictures", 0.6, 0.5, CARE),
        ("pictures", 0.61, 0.9, FAR),
        ("text", math.nan, 1.0, FAR),
        ("pictures", math.inf, 1.0, FAR),
        ("text", 0.01, math.nan, FAR),
        ("text", 0.3, 0.25, CARE),
        ("text", 0.05, 0.24, FAR),  # a model that is sure of nothing is near any other
        ("own text", 0.7, 0.5, CARE),
        ("own pictures", 0.7, 0.5, FAR),
    ],
)
def test_level_follows_kl_and_the_share_of_likeliest_tokens(kind, kl, top1, level):
    verdict = judge({kind: Agreement(kl, top1)}, 1.3)
    assert (verdict.level, verdict.kind) == (level, kind)


def test_the_kind_on_which_the_model_is_worst_decides():
    good, fair, bad = Agreement(0.01, 0.99), Agreement(0.3, 0.8), Agreement(5.0, 0.1)
    assert judge({"text": good, "pictures": good}, 1.3).level == CLOSE
    for text, pictures, level, kind in (
        (good, fair, CARE, "pictures"),
        (fair, good, CARE, "text"),
        (fair, bad, FAR, "pictures"),
        (bad, fair, FAR, "text"),
    ):
        verdict = judge({"text": text, "pictures": pictures}, 1.3)
        assert (verdict.level, verdict.kind) == (level, kind)


def test_samples_of_ones_own_decide_where_there_are_some():
    good, bad = Agreement(0.01, 0.99), Agreement(5.0, 0.1)
    verdict = judge({"text": bad, "own text": good}, 1.3)
    assert (verdict.level, verdict.kind) == (CLOSE, "own text")
    assert judge({"text": good, "own text": good, "own pictures": bad}, 1.3).kind == "own pictures"
    assert forgotten({"text": bad, "pictures": good, "own text": good}) == ["text"]
    assert forgotten({"text": bad, "pictures": good}) == []  # which is the verdict itself
    assert forgotten({"text": good, "own text": bad}) == []


def test_limits_agree_with_what_was_measured():
    """Rows of docs/benchmarks.md: KL on questions about pictures, and the share of the dense answers that is kept."""
    kept = {0.02: 0.98, 0.04: 1.0, 0.08: 1.0, 0.09: 1.0, 0.25: 0.86, 0.36: 0.49, 0.56: 0.72, 0.69: 0.59, 0.70: 0.33}
    kept |= {0.88: 0.37, 0.98: 0.51, 1.29: 0.41, 1.92: 0.0}
    limits = LIMITS["pictures"]
    assert min(share for kl, share in kept.items() if kl <= limits.close_kl) >= 0.98
    assert max(share for kl, share in kept.items() if kl > limits.far_kl) < 0.6


def test_a_model_that_was_not_compared_is_not_judged():
    verdict = judge({}, 1.3)
    assert verdict.level == UNKNOWN
    assert str(verdict).startswith("not compared with the dense model: ")


def test_advice_for_more_bits_knows_how_many_there_are():
    far = {"text": Agreement(3.0, 0.1)}
    assert "the preset two-bit" in judge(far, 1.3).advice
    assert "target_bits above 2.24" in judge(far, 2.236).advice


def test_the_reason_holds_what_was_measured_and_the_limits():
    reason = judge({"pictures": Agreement(0.3, 0.84)}, 1.3).reason
    assert "on pictures" in reason and "KL 0.30" in reason and "84%" in reason and "above 0.6 nats" in reason


def test_of_two_kinds_of_one_level_the_one_nearer_to_its_limit_decides():
    found = {"text": Agreement(0.21, 0.64), "pictures": Agreement(0.55, 0.77)}
    assert judge(found, 1.3).kind == "pictures"
    assert judge({**found, "text": Agreement(0.99, 0.64)}, 1.3).kind == "text"
