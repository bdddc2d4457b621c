import pytest
import torch

from optimum_sab.calibration.samples.modality import TokenModalities
from optimum_sab.calibration.statistics.hessian import HessianPass
from optimum_sab.calibration.statistics.pairing import pair_streams
from optimum_sab.calibration.streams.arrival import DENSE, QUANTIZED, Arrival

CPU = torch.device("cpu")
WIDTH = 6


def rows(count, seed=0, scale=1.0):
    return scale * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def modalities(*labels, names=("text", "visual")):
    return TokenModalities(names, torch.tensor(labels))


def collect(*inputs):
    return HessianPass().collect("the.linear", inputs, CPU)


def test_pairing_brings_the_streams_of_a_sample_together():
    x = [rows(3, seed=i) for i in range(4)]
    arrivals = [
        Arrival(1, QUANTIZED, x[0][None]),
        Arrival(0, DENSE, x[1][None]),
        Arrival(1, DENSE, x[2][None]),
        Arrival(0, QUANTIZED, x[3][None]),
    ]
    each = [modalities(0, 0, 1), modalities(1, 1, 1)]
    pairs = pair_streams(arrivals, each)
    assert [(p.quantized is not None, p.modalities) for p in pairs] == [(True, each[1]), (True, each[0])]
    assert torch.equal(pairs[0].quantized, x[0])
    assert torch.equal(pairs[0].dense, x[2])
    assert torch.equal(pairs[1].quantized, x[3])
    assert torch.equal(pairs[1].dense, x[1])


@pytest.mark.parametrize(
    "dense",
    [
        [],
        [Arrival(0, DENSE, rows(3))],
        [Arrival(0, DENSE, rows(3)), Arrival(1, DENSE, rows(5))],
    ],
    ids=["one stream", "one sample routed elsewhere", "another number of tokens"],
)
def test_pairing_drops_the_dense_stream_of_all_samples_where_routes_differ(dense):
    arrivals = [Arrival(0, QUANTIZED, rows(3)), Arrival(1, QUANTIZED, rows(4)), *dense]
    assert [p.dense for p in pair_streams(arrivals, [modalities(0), modalities(0)])] == [None, None]


def both_streams(*each):
    """Arrivals of samples 0, 1, … in either stream, from (rows, whether more had entered the block)."""
    return [
        Arrival(i, stream, rows(count, seed=i), rows(count), count + routed)
        for stream in (DENSE, QUANTIZED)
        for i, (count, routed) in enumerate(each)
    ]


@pytest.mark.parametrize(
    ("arrivals", "samples"),
    [(both_streams((2, True), (3, False)), 2), (both_streams((3, False), (3, False)), 3)],
    ids=["some rows are not the tokens", "a sample has no rows"],
)
def test_rows_of_an_expert_are_not_paired_though_they_are_as_many(arrivals, samples):
    pairs = pair_streams(arrivals, [modalities(0, 1, 1)] * samples)
    assert [(p.dense, p.residual, p.routed) for p in pairs] == [(None, None, True)] * 2
    assert collect(*pairs).tokens == {"mixed": sum(p.quantized.shape[0] for p in pairs)}
    assert collect(*pairs).drift is None


def test_rows_of_all_tokens_are_paired_in_a_block_that_carries_several_hidden_states_per_token():
    pairs = pair_streams(both_streams((3, True), (3, True)), [modalities(0, 1, 1)] * 2)
    assert [p.routed for p in pairs] == [False, False]
    assert collect(*pairs).tokens == {"text": 2, "visual": 4}


def test_rows_of_all_tokens_of_all_samples_are_paired():
    pairs = pair_streams(both_streams((3, False), (3, False)), [modalities(0, 1, 1)] * 2)
    assert [p.routed for p in pairs] == [False, False]
    assert all(p.dense is not None and p.residual is not None for p in pairs)
