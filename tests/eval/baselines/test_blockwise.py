"""Binarization against its definition, compensation against the least-squares optimum."""

import pytest
import torch

from optimum_sab.core.factorization import factor_hessian
from optimum_sab.core.solver import output_error
from optimum_sab.eval.baselines.blockwise import binarize, binarize_twice, compensated, compensated_by_column


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("centred", [False, True])
def test_binarization_is_least_squares_for_its_signs(centred):
    values, mask = random(5, 40), random(5, 40, seed=1) > -0.3
    found = binarize(values, mask, centred)
    assert not found[~mask].any()
    for i in range(5):
        inside = values[i][mask[i]]
        mean = inside.mean() if centred else torch.tensor(0.0)
        wanted = mean + (inside - mean).abs().mean() * torch.where(inside >= mean, 1.0, -1.0)
        torch.testing.assert_close(found[i][mask[i]], wanted)


def test_a_second_plane_makes_four_levels_and_less_error():
    values, mask = random(5, 40), torch.ones(5, 40, dtype=torch.bool)
    once, twice = binarize(values, mask), binarize_twice(values, mask)
    assert (values - twice).square().sum() < (values - once).square().sum()
    assert all(row.unique().numel() == 4 for row in twice)


def test_a_row_without_entries_is_zero():
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1] = False
    assert not binarize_twice(random(3, 8), mask, centred=True)[1].any()


def zeroed_first_half():
    """A layer, its Hessian, and the second half that least squares would take where the first is zero."""
    inputs = random(400, 64, seed=2) @ random(64, 64, seed=3)
    weight, factored = random(6, 64), factor_hessian(inputs.T @ inputs / 400, 0.01)
    H = factored.hessian
    best = weight[:, 32:] + weight[:, :32] @ torch.linalg.solve(H[32:, 32:], H[32:, :32]).T
    return weight, factored, best


def test_compensation_by_column_is_the_exact_minimiser_over_later_blocks():
    weight, factored, best = zeroed_first_half()

    def open_block(block, columns):
        return lambda column, place: column * float(columns.start > 0)

    found = compensated_by_column(weight, factored, open_block, 32)
    torch.testing.assert_close(found[:, 32:], best, rtol=1e-3, atol=1e-3)


def test_compensation_by_block_is_exact_for_an_error_in_its_last_column():
    weight, factored, _ = zeroed_first_half()
    one_column = weight.clone()
    one_column[:, 31] = 0.0
    found = compensated(
        weight, factored, lambda block, columns: one_column[:, columns] if columns.start == 0 else block, 32
    )
    none = output_error(weight, one_column, factored.hessian)
    assert output_error(weight, found, factored.hessian) < 0.9 * none
    # with an error in the block's last column alone, U's off-diagonals inside the block have nothing to say
    H = factored.hessian
    exact = one_column.clone()
    exact[:, 32:] += weight[:, 31:32] @ torch.linalg.solve(H[32:, 32:], H[32:, 31:32]).T
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)
