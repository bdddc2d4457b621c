"""The divergence at a scale, by the short way and by the model's own logits."""

import pytest
import torch

from optimum_sab.calibration.predictions import scaled
from optimum_sab.calibration.predictions.scaled import ScaledDivergence
from optimum_sab.calibration.ranks import Ranks

WEIGHT = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))


def linear(hidden):
    return hidden @ WEIGHT.to(hidden.dtype).T


HEADS = {
    "linear": linear,
    "capped": lambda hidden: 5 * torch.tanh(linear(hidden) / 5),
    "biased": lambda hidden: linear(hidden) + torch.arange(50),
}


def chunks(sizes=(70, 33, 5), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 16, generator=generator) for size in sizes]


def kl(head, dense, mine, scale):
    """In double precision."""
    p, q = (head(torch.cat(some).double()).log_softmax(-1) for some in (dense, [scale * each for each in mine]))
    return float((p.exp() * (p - q)).sum()) / len(p)


@pytest.fixture(params=HEADS)
def head(request):
    """Its name, logits it makes, and how many tokens it was given at every call."""
    calls = []
    return request.param, lambda hidden: calls.append(len(hidden)) or HEADS[request.param](hidden), calls


@pytest.mark.parametrize("scale", [0.5, 0.83, 1.0, 1.25])
def test_both_ways_give_the_divergence(head, scale):
    _, logits_of, _ = head
    dense, mine = chunks(), [each + 0.5 for each in chunks()]
    found = ScaledDivergence(logits_of, dense, mine)
    expected = kl(logits_of, dense, mine, scale)
    assert found.at(scale) == pytest.approx(expected, rel=1e-5)
    assert found.exactly(scale) == pytest.approx(expected, rel=1e-5)
    assert found.unscaled == pytest.approx(kl(logits_of, dense, mine, 1.0), rel=1e-5)


def test_only_a_head_that_scales_along_is_spared(head):
    name, logits_of, calls = head
    found = ScaledDivergence(logits_of, chunks(), chunks(seed=2))
    calls.clear()
    found.at(0.8)
    assert calls == ([] if name == "linear" else [70, 70, 33, 33, 5, 5])


def test_logits_that_find_no_room_are_made_again(monkeypatch):
    monkeypatch.setattr(scaled, "KEPT_BYTES", 80 * 50 * 4)  # of the first chunk
    calls = []
    dense, mine = chunks(), chunks(seed=2)
    found = ScaledDivergence(lambda h: calls.append(len(h)) or linear(h), dense, mine)
    calls.clear()
    assert found.at(0.8) == pytest.approx(kl(linear, dense, mine, 0.8), rel=1e-5)
    assert calls == [33, 5]


def test_equal_streams_do_not_differ():
    assert ScaledDivergence(linear, chunks(), chunks()).unscaled == 0.0


def test_what_ranks_find_is_added_in_the_order_of_chunks():
    """Which is that of one process: 1e16 and 1 are 1e16 again."""

    class Told(Ranks):
        def exchange(self, at, value):
            return [[1e16, 1.0], [-1e16]]

    few = [torch.ones(2, 16)] * 3
    assert ScaledDivergence(linear, few, few, Told(1, 2)).unscaled == 1.0 / 6
