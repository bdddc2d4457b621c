import numpy as np
import pytest
import torch

from optimum_sab.core import refit
from optimum_sab.core.factorization import damped
from optimum_sab.core.planes import block_bounds
from optimum_sab.core.refit import RIDGE, refit_row_scale

BLOCK = 32


def problem(inputs, planes=2, salient=5, out=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = inputs.shape[1]
    signs = [torch.randn(out, width, generator=generator).sign() for _ in range(planes)]
    if planes > 1:
        signs[-1] *= (torch.arange(width) % BLOCK < salient).float()  # a residual plane
    column = torch.rand(width, generator=generator) + 0.5
    target = torch.randn(out, width, generator=generator)
    return signs, column, target, damped(inputs.T @ inputs / len(inputs), 0.01)


def basis_of(signs, column, block=BLOCK):
    """V [out, K, in], one vector per (plane, block), in double precision."""
    out, width = signs[0].shape
    bounds = block_bounds(width, block)
    basis = np.zeros((out, len(signs) * len(bounds), width))
    for p, sign in enumerate(signs):
        for k, (start, end) in enumerate(bounds):
            for i in range(out):
                for j in range(start, end):
                    basis[i, p * len(bounds) + k, j] = float(sign[i, j]) * float(column[j])
    return basis


def flat(row_scale):
    """[planes, blocks, out] as [out, K]."""
    return row_scale.permute(2, 0, 1).flatten(1).double().numpy()


def error(scales, basis, target, hessian):
    difference = target - scales @ basis
    return difference @ hessian @ difference


@pytest.mark.parametrize("width", [32, 96, 75, 20])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_refit_solves_the_normal_equations_of_the_explicit_basis(width, planes, correlated_inputs):
    signs, column, target, hessian = problem(correlated_inputs(200, width), planes)
    found = refit_row_scale(signs, column, target @ hessian, hessian, BLOCK)
    assert found.shape == (planes, -(-width // BLOCK), 4)
    basis, H = basis_of(signs, column), hessian.double().numpy()
    for i in range(4):
        gram = basis[i] @ H @ basis[i].T
        ridge = RIDGE * np.diag(gram) + 1e-8 * np.diag(gram).max()
        right = basis[i] @ H @ target[i].double().numpy()
        np.testing.assert_allclose(flat(found)[i], np.linalg.solve(gram + np.diag(ridge), right), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_refit_is_the_least_squares_optimum(planes, correlated_inputs):
    """Against `lstsq` on ``V root(H)`` without any ridge: the error is the least one to a thousandth."""
    signs, column, target, hessian = problem(correlated_inputs(200, 96), planes)
    found = flat(refit_row_scale(signs, column, target @ hessian, hessian, BLOCK))
    basis, H = basis_of(signs, column), hessian.double().numpy()
    root = np.linalg.cholesky(H)
    for i in range(4):
        row = target[i].double().numpy()
        best = np.linalg.lstsq((basis[i] @ root).T, row @ root, rcond=None)[0]
        least = error(best, basis[i], row, H)
        assert least * (1 - 1e-9) <= error(found[i], basis[i], row, H) <= least * 1.001


@pytest.mark.parametrize("planes", [1, 2])
def test_refit_error_rises_when_any_scale_is_moved(planes, correlated_inputs):
    signs, column, target, hessian = problem(correlated_inputs(200, 96), planes)
    found = flat(refit_row_scale(signs, column, target @ hessian, hessian, BLOCK))
    basis, H = basis_of(signs, column), hessian.double().numpy()
    for i in range(4):
        row = target[i].double().numpy()
        least = error(found[i], basis[i], row, H)
        for k in range(found.shape[1]):
            for step in (-0.02, 0.02):
                moved = found[i].copy()
                moved[k] += step * np.abs(found[i]).mean()
                assert error(moved, basis[i], row, H) > least


def test_refit_recovers_the_scales_a_weight_was_made_of(correlated_inputs):
    signs, column, _, hessian = problem(correlated_inputs(200, 96), 2)
    scales = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(9)) + 0.5
    target = torch.from_numpy(np.einsum("ik,ikj->ij", flat(scales), basis_of(signs, column))).float()
    torch.testing.assert_close(
        refit_row_scale(signs, column, target @ hessian, hessian, BLOCK), scales, rtol=1e-2, atol=1e-2
    )


def test_refit_in_chunks_of_rows_equals_refit_at_once(correlated_inputs, monkeypatch):
    signs, column, target, hessian = problem(correlated_inputs(200, 96), 2, out=11)
    given = signs, column, target @ hessian, hessian, BLOCK
    whole = refit_row_scale(*given)
    for size in (1, 20_000):
        monkeypatch.setattr(refit, "GRAM_BYTES", size)
        torch.testing.assert_close(refit_row_scale(*given), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("width", [20, 96, 180])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_refit_of_half_a_gram_matrix_equals_refit_of_all(width, planes, correlated_inputs, monkeypatch):
    signs, column, target, hessian = problem(correlated_inputs(300, width), planes, out=5)
    given = signs, column, target @ hessian, hessian, BLOCK
    whole = refit_row_scale(*given)
    monkeypatch.setattr(refit, "WIDE", 1)
    for tile in (1, 2 * BLOCK, 10**6):
        monkeypatch.setattr(refit, "TILE", tile)
        torch.testing.assert_close(refit_row_scale(*given), whole, rtol=1e-3, atol=1e-4)


def test_refit_of_coinciding_planes_is_finite_and_as_good_as_one_plane(correlated_inputs):
    signs, column, target, hessian = problem(correlated_inputs(200, 96), 1)
    one = refit_row_scale(signs, column, target @ hessian, hessian, BLOCK)
    two = refit_row_scale([signs[0], signs[0].clone()], column, target @ hessian, hessian, BLOCK)
    assert two.isfinite().all()
    torch.testing.assert_close(two.sum(0), one[0], rtol=1e-2, atol=1e-3)


def test_refit_gives_zero_to_what_has_no_energy(correlated_inputs):
    """A dead block (c = 0), a plane without columns, and a row whose target is zero."""
    signs, column, target, hessian = problem(correlated_inputs(200, 96), 2)
    column[32:64] = 0
    signs[1][:, 64:] = 0
    target[2] = 0
    found = refit_row_scale(signs, column, target @ hessian, hessian, BLOCK)
    assert found.isfinite().all()
    assert not found[:, 1].any()
    assert not found[1, 2].any()
    assert not found[:, :, 2].any()
    assert found[0, 0, 0] != 0
