"""Errors by modality, and the significance of a block's first linears."""

import pytest
import torch

from optimum_sab.calibration.blocks.measured import ROWS, ModalityRows, block_significance, errors_of
from optimum_sab.calibration.samples.modality import TokenModalities
from optimum_sab.calibration.statistics.group_inputs import GroupInputs
from optimum_sab.calibration.statistics.hessian import HessianPass
from optimum_sab.calibration.statistics.pairing import PairedInputs
from optimum_sab.core.factorization import factor_hessian
from optimum_sab.core.significance import significance_map

CPU = torch.device("cpu")
WIDTH = 6


def rows(count, seed):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def pair(labels, seed, two_streams=True):
    count = len(labels)
    dense = rows(count, seed + 100) if two_streams else None
    return PairedInputs(rows(count, seed), dense, TokenModalities(("text", "visual"), torch.tensor(labels)))


@pytest.fixture
def weights():
    weight = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(9))
    return weight, weight + 0.1 * torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10))


@pytest.mark.parametrize("two_streams", [True, False])
def test_errors_are_those_of_the_outputs_by_modality(weights, two_streams):
    weight, approximation = weights
    pairs = [pair([0, 1, 1, 0], 1, two_streams), pair([1, 1, 0], 2, two_streams)]
    found = errors_of([ModalityRows.of(GroupInputs.alone(pairs), CPU).sums(weight, approximation)])
    for index, name in enumerate(("text", "visual")):
        above = below = 0.0
        for each in pairs:
            mask = each.modalities.labels == index
            x = (each.dense if two_streams else each.quantized)[mask]
            wanted = x @ weight.T
            above += float((wanted - each.quantized[mask] @ approximation.T).square().sum())
            below += float(wanted.square().sum())
        assert found[name] == pytest.approx(above / below, rel=1e-5)
    assert found["text"] != pytest.approx(found["visual"], rel=1e-2)


def test_many_rows_are_thinned_evenly():
    many = ROWS * 5
    found = ModalityRows.of(GroupInputs.alone([pair([0] * many, 1)]), CPU).rows
    assert set(found) == {"text"}
    assert ROWS <= len(found["text"][0]) <= ROWS * 1.2
    assert torch.equal(found["text"][0], rows(many, 1)[::5])
    assert torch.equal(found["text"][1], rows(many, 101)[::5])


def test_rows_that_cannot_be_told_apart_are_mixed(weights):
    routed = PairedInputs(rows(3, 1), None, TokenModalities(("text", "visual"), torch.tensor([0, 1, 1, 1])), None, True)
    assert set(ModalityRows.of(GroupInputs.alone([routed]), CPU).sums(*weights)) == {"mixed"}


def test_a_zero_output_has_no_error(weights):
    weight, approximation = weights
    rows = ModalityRows.of(GroupInputs.alone([pair([0, 0], 1)]), CPU)
    assert errors_of([rows.sums(torch.zeros_like(weight), approximation)]) == {"text": 0.0}


def statistics(*pairs, by_modality=True):
    collector = HessianPass()
    collector.by_modality = by_modality
    return collector.collect("linear", list(pairs), CPU)


def test_significance_is_the_papers_of_the_stack(weights):
    weight = torch.cat(weights)
    gathered = statistics(pair([0, 1] * 10, 1), pair([1, 1, 0] * 5, 2))
    found = block_significance(weight, gathered, 0.1)
    inverse = [factor_hessian(H, 0.1).inverse_diagonal for H in gathered.by_modality.values()]
    wanted = significance_map(weight, torch.stack(inverse))
    assert found.ratio == wanted.ratio > 0
    assert found.spatial == pytest.approx(float(wanted.spatial.mean()))
    assert 0 < found.spatial < 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_significance_does_not_hang_on_the_size_of_weights(weights, scale):
    gathered = statistics(pair([0, 1] * 10, 1))
    plain, scaled = (block_significance(w, gathered, 0.1) for w in (weights[0], weights[0] * scale))
    assert scaled.ratio == pytest.approx(plain.ratio, rel=1e-3)
    assert scaled.spatial == pytest.approx(plain.spatial, rel=1e-3)


def test_one_modality_has_no_significance_of_its_own(weights):
    assert block_significance(weights[0], statistics(pair([0, 0, 0], 1)), 0.1) is None
    assert block_significance(weights[0], statistics(pair([0, 1], 1), by_modality=False), 0.1) is None
