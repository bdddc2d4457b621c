import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from optimum_sab.core import factorization
from optimum_sab.core.factorization import CORNER, STRIP, WIDE, damped, factor_hessian, invert_upper, solve_damped
from optimum_sab.errors import NonFiniteError, SingularHessianError

bounded = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
ways = pytest.mark.parametrize("wide", [1, WIDE], ids=["wide", "narrow"])


def normal(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def positive(width, seed=0):
    mixing = normal(width + 5, width, seed)
    return mixing.T @ mixing / (width + 5)


def test_damped_adds_a_share_of_the_mean_diagonal_to_the_diagonal():
    hessian = torch.tensor([[1.0, 0.5], [0.5, 3.0]])
    assert torch.equal(damped(hessian, 0.25), torch.tensor([[1.5, 0.5], [0.5, 3.5]]))
    assert torch.equal(hessian, torch.tensor([[1.0, 0.5], [0.5, 3.0]]))


@ways
@bounded
@hypothesis.given(st.integers(0, 10**6), st.integers(1, 12))
def test_factor_hessian_holds_the_upper_factor_of_the_inverse(wide, seed, width):
    hessian = positive(width, seed)
    factored = of_width(wide, hessian, 0.05)
    expected = np.linalg.inv(damped(hessian, 0.05).double().numpy())
    left = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    product = left.double().numpy() @ expected
    np.testing.assert_allclose(factored.times_inverse(left).numpy(), product, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(factored.inverse_diagonal.numpy(), np.diag(expected), rtol=1e-3, atol=1e-4)
    upper = factored.inverse_factor.double().numpy()
    np.testing.assert_allclose(upper.T @ upper, expected, rtol=1e-3, atol=1e-4)
    assert np.array_equal(upper, np.triu(upper))
    assert (np.diag(upper) > 0).all()
    assert torch.equal(factored.hessian, damped(hessian, 0.05))


@ways
def test_factor_hessian_marks_the_columns_that_were_always_zero(wide):
    inputs = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    inputs[:, [1, 4]] = 0
    factored = of_width(wide, inputs.T @ inputs, 0.01)
    assert factored.dead.tolist() == [False, True, False, False, True]
    off = factored.inverse_factor.clone().fill_diagonal_(0)
    assert not off[[1, 4]].any()
    assert not off[:, [1, 4]].any()


@ways
def test_factor_hessian_of_constant_inputs_succeeds(wide):
    inputs = torch.ones(50, 1) * torch.arange(1.0, 9.0)
    factored = of_width(wide, inputs.T @ inputs, 0.01)
    assert factored.inverse_factor.isfinite().all()
    product = factored.times_inverse(factored.hessian).double()
    torch.testing.assert_close(product, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-3)


@ways
@pytest.mark.parametrize(("least", "raised"), [(0.5, 1.0), (-0.05, 10.0), (-0.5, 100.0)])
def test_factor_hessian_raises_the_damping_tenfold_until_a_factor_exists(least, raised, wide):
    diagonal = torch.tensor([least, 1.0, 1.0, 2.0 - least])  # mean 1, so that the damping is an absolute number
    factored = of_width(wide, torch.diag(diagonal), 0.01)
    torch.testing.assert_close(factored.hessian.diagonal(), diagonal + 0.01 * raised)


@ways
def test_factor_hessian_gives_up_at_a_hundred_times_the_damping(wide):
    hessian = torch.diag(torch.tensor([-1.5, 1.0, 1.0, 3.5]))  # mean 1; 100 · 0.01 does not lift −1.5 above 0
    with pytest.raises(SingularHessianError, match=r"model\.layers\.3\.q_proj.*damping=1;"):
        of_width(wide, hessian, 0.01, "model.layers.3.q_proj")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_factor_hessian_refuses_what_is_not_finite(bad):
    hessian = torch.eye(3)
    hessian[0, 1] = bad
    with pytest.raises(NonFiniteError, match=r"model\.layers\.3\.q_proj"):
        factor_hessian(hessian, 0.01, "model.layers.3.q_proj")


@pytest.mark.parametrize("width", [1, CORNER, CORNER + 1, STRIP + 3, 2 * STRIP + 77])
def test_factors_of_any_width_are_those_of_double_precision(width):
    """Halves of halves, and strips of which the last is narrower."""
    hessian = positive(width, 1)
    factored = of_width(1, hessian, 0.1)
    exact = torch.linalg.inv(damped(hessian, 0.1).double())
    upper = factored.inverse_factor.double()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, exact, rtol=1e-4, atol=1e-4)
    left = torch.randn(5, width, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(factored.times_inverse(left).double(), left.double() @ exact, rtol=1e-4, atol=1e-4)
    both = of_width(WIDE + width, hessian, 0.1)
    torch.testing.assert_close(factored.inverse_factor, both.inverse_factor, rtol=1e-3, atol=1e-4)
    assert torch.equal(factored.hessian, both.hessian)


def test_a_triangle_is_inverted_in_its_place():
    R = torch.linalg.cholesky(positive(2 * CORNER + 9) + torch.eye(2 * CORNER + 9), upper=True)
    before = R.clone()
    found = invert_upper(R)
    assert found is R
    torch.testing.assert_close(before @ found, torch.eye(len(R)), rtol=0, atol=1e-5)


def of_width(wide, *given):
    """`factor_hessian` where matrices from that width on count as wide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factorization, "WIDE", wide)
        return factor_hessian(*given)


@bounded
@hypothesis.given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 4))
def test_solve_damped_multiplies_with_the_inverse_of_the_damped_hessian(seed, width, out):
    hessian, right = positive(width, seed), normal(out, width, seed + 1)
    expected = right.double().numpy() @ np.linalg.inv(damped(hessian, 0.05).double().numpy())
    np.testing.assert_allclose(solve_damped(right, hessian, 0.05).numpy(), expected, rtol=1e-3, atol=1e-4)


def test_solve_damped_raises_the_damping_and_gives_up_as_the_factorization_does():
    diagonal = torch.tensor([-0.05, 1.0, 1.0, 2.05])
    torch.testing.assert_close(solve_damped(torch.ones(1, 4), torch.diag(diagonal), 0.01)[0], 1 / (diagonal + 0.1))
    with pytest.raises(SingularHessianError, match=r"the\.linear.*damping=1;"):
        solve_damped(torch.ones(1, 4), torch.diag(torch.tensor([-1.5, 1.0, 1.0, 3.5])), 0.01, "the.linear")


@pytest.mark.parametrize("width", [3, CORNER + 1, 2 * CORNER + 9, 2 * STRIP + 77])
def test_solve_damped_of_any_width_is_that_of_double_precision(width, monkeypatch):
    monkeypatch.setattr(factorization, "WIDE", 1)
    hessian, right = positive(width, 4), normal(5, width, 5)
    exact = right.double() @ torch.linalg.inv(damped(hessian, 0.1).double())
    torch.testing.assert_close(solve_damped(right, hessian, 0.1).double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", [0, CORNER, 2 * CORNER + 8])
def test_a_matrix_without_a_root_is_told_wherever_that_shows(place):
    matrix = torch.eye(2 * CORNER + 9)
    matrix[place, place] = -1.0
    assert not factorization.upper_root(matrix)
    assert factorization.upper_root(torch.eye(2 * CORNER + 9))


@pytest.mark.parametrize("width", [7, STRIP, 2 * STRIP + 77])
def test_quadratic_form_by_half_of_the_hessian_is_that_by_all(width, monkeypatch):
    hessian, matrix = positive(width, 6), normal(5, width, 7)
    exact = float((matrix.double() @ hessian.double() @ matrix.double().T).trace())
    for wide in (1, WIDE + width):
        monkeypatch.setattr(factorization, "WIDE", wide)
        assert factorization.quadratic_form(matrix, hessian) == pytest.approx(exact, rel=1e-5)
