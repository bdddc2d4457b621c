"""The searches: against all candidates, and on blocks whose answer is known."""

import pytest
import torch

from optimum_sab.eval.baselines.split import PERCENTILES, salient_columns, split_by_magnitude


def block_of(out, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, width, generator=generator) * (0.2 + torch.rand(width, generator=generator) ** 2)


@pytest.mark.parametrize("weighted", [False, True])
def test_split_is_the_best_of_all_break_points(weighted):
    values = block_of(7, 60)
    error_weight = torch.rand(60, generator=torch.Generator().manual_seed(5)) + 0.05 if weighted else torch.ones(60)
    upper = split_by_magnitude(values, error_weight if weighted else None)

    def error(upper):
        total = torch.tensor(0.0)
        for group in (upper, ~upper):
            share = (error_weight * group).sum(1, keepdim=True)
            scale = (error_weight * group * values.abs()).sum(1, keepdim=True) / share.clamp_min(1e-9)
            total += (error_weight * group * (values.abs() - scale).square()).sum()
        return total

    ordered = values.abs().flatten().sort().values
    errors = torch.stack([error(values.abs() > ordered[int(p * 419)]) for p in PERCENTILES])
    assert errors.min() < 0.95 * errors.max()
    torch.testing.assert_close(error(upper), errors.min())


def test_a_break_point_per_row_is_the_best_of_every_row():
    """As the best of all rows would be, were each row the only one and the candidates the same."""
    values = block_of(5, 200) * torch.tensor([0.3, 0.6, 1.0, 1.5, 2.0])[:, None]
    upper = split_by_magnitude(values, per_row=True)
    assert not torch.equal(upper, split_by_magnitude(values))
    ordered = values.abs().flatten().sort().values
    candidates = [ordered[int(p * (values.numel() - 1))] for p in PERCENTILES]
    for row, found in zip(values.abs(), upper, strict=True):
        assert within_groups(row, found) == pytest.approx(min(within_groups(row, row > cut) for cut in candidates))


def within_groups(sizes, upper):
    """Squared error of two groups under a mean magnitude each."""
    return sum(float((group - group.mean()).square().sum()) for group in (sizes[upper], sizes[~upper]) if len(group))


def test_split_parts_two_populations():
    values = torch.cat([torch.full((4, 30), 0.1), torch.full((4, 10), 3.0)], 1)
    values[:, ::2] *= -1
    assert torch.equal(split_by_magnitude(values), values.abs() > 1)


def test_split_goes_where_the_weight_is():
    """Two pairs of populations; the break point parts the pair in the columns that count."""
    values = torch.cat([torch.full((4, 20), v) for v in (0.1, 1.0, 2.0, 9.0)], 1)
    first = torch.tensor([1.0, 1.0, 1e-6, 1e-6]).repeat_interleave(20)
    assert torch.equal(split_by_magnitude(values, first), values > 0.5)
    assert torch.equal(split_by_magnitude(values, first.flip(0)), values > 5)


def test_salient_columns_are_those_that_stand_out():
    """The number is found and is not the limit: six columns of a hundred times the saliency."""
    saliencies = block_of(64, 128).square() + 0.1
    standing = torch.zeros(128, dtype=torch.bool)
    standing[[3, 17, 40, 77, 90, 127]] = True
    saliencies[:, standing] *= 100
    assert torch.equal(salient_columns(saliencies), standing)


@pytest.mark.parametrize(("width", "limit"), [(1, 50), (2, 50), (128, 4)])
def test_salient_columns_stay_below_limit_and_width(width, limit):
    assert int(salient_columns(block_of(8, width).square(), limit).sum()) < min(limit, width)
