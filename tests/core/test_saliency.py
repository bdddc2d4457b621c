import pytest
import torch

from optimum_sab.core.saliency import saliency, salient_mask


def test_saliency_is_the_squared_weight_over_the_squared_diagonal():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, generator=generator)
    diagonal = torch.rand(5, generator=generator) + 0.1
    found = saliency(weight, diagonal)
    for i in range(3):
        for j in range(5):
            expected = float(weight[i, j]) ** 2 / float(diagonal[j]) ** 2
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-6)


def test_salient_mask_marks_the_largest():
    score = torch.tensor([0.5, 3.0, 1.0, 2.0])
    assert salient_mask(score, 2).tolist() == [False, True, False, True]


def test_salient_mask_gives_ties_to_the_lower_column():
    score = torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0])
    assert salient_mask(score, 3).tolist() == [True, True, False, False, True]
    assert salient_mask(torch.ones(300), 5).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_salient_mask_marks_as_many_as_asked(count):
    assert int(salient_mask(torch.randn(7, generator=torch.Generator().manual_seed(1)), count).sum()) == count
