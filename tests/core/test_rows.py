import pytest
import torch

from optimum_sab.core.factored_rows import factor_rows
from optimum_sab.core.hessian import InputMoments, factor_hessian
from optimum_sab.core.planes import WeightFit
from optimum_sab.core.refit import refit_row_scale
from optimum_sab.core.refit_by_rows import RowOutputs
from optimum_sab.core.refit_by_rows import refit_row_scale as refit_by_rows
from optimum_sab.core.rows import InputRows
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import CalibrationError, NonFiniteError, SingularHessianError

CPU = torch.device("cpu")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(width=24, residual=False, dtype=torch.float32):
    rows = InputRows(width, CPU, True, "an expert")
    for seed, (name, half) in enumerate([("text", True), ("visual", False), ("text", False), ("visual", True)]):
        x = drawn(3 + seed, width, seed=seed).to(dtype) * (1 + seed)
        r = drawn(3 + seed, 5, seed=10 + seed).to(dtype) if residual else None
        rows.add(name, x, x + 0.1 * drawn(3 + seed, width, seed=20 + seed).to(dtype), r, half=half)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["balanced", "tokens", "text"])
def test_weighted_rows_have_the_second_moments_of_the_statistics(weighting, dtype):
    rows = filled(residual=True, dtype=dtype)
    expected, found = rows.statistics(weighting), rows.weighted(weighting)
    X = found.quantized
    torch.testing.assert_close(X.T @ X, expected.hessian)
    torch.testing.assert_close(found.apart.T @ X, expected.drift)
    torch.testing.assert_close(found.residual.T @ X, expected.residual)
    first = X[: found.half]
    torch.testing.assert_close(first.T @ first, expected.half.hessian)
    torch.testing.assert_close(found.residual[: found.half].T @ first, expected.half.residual)
    assert rows.tokens == expected.tokens == {"text": 8, "visual": 10} and rows.count == 18


def test_statistics_are_those_of_the_moments_bit_for_bit():
    moments, rows = InputMoments(24, CPU, False, "x"), InputRows(24, CPU, False, "x")
    for each in (moments, rows):
        for seed in range(3):
            each.add("text", drawn(7, 24, seed=seed))
    assert torch.equal(moments.statistics().hessian, rows.statistics().hessian)
    assert torch.equal(rows.statistics().hessian, rows.statistics().hessian)  # they are not used up


def test_rows_that_cannot_be_used_are_refused():
    rows = InputRows(8, CPU, True, "experts.3")
    with pytest.raises(CalibrationError, match=r"experts\.3.*dense one is missing"):
        rows.add("text", drawn(2, 8))
    with pytest.raises(CalibrationError, match=r"experts\.3 has 8 inputs.*\(2, 9\)"):
        rows.add("text", drawn(2, 9), drawn(2, 9))
    rows.add("text", torch.zeros(2, 8), torch.zeros(2, 8))
    with pytest.raises(CalibrationError, match=r"non-zero input reached experts\.3"):
        rows.weighted()
    rows.add("text", torch.full((1, 8), float("nan")), drawn(1, 8))
    with pytest.raises(NonFiniteError, match=r"experts\.3"):
        rows.weighted()


@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize("count", [1, 20])
def test_factors_of_rows_are_those_of_their_hessian(correlated_inputs, count, width):
    X = correlated_inputs(count, width)
    X[:, 5] = 0
    exact = factor_hessian(X.double().T @ X.double(), 0.1)
    found = factor_rows(X, 0.1, 32)
    torch.testing.assert_close(found.hessian.double(), exact.hessian, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.inverse_factor.double(), exact.inverse_factor, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.diagonal, found.hessian.diagonal())
    torch.testing.assert_close(found.local(32, 64), found.hessian[32:64, 32:64])
    assert found.dead.nonzero().tolist() == [[5]]


def test_rows_without_a_factor_are_refused():
    with pytest.raises(SingularHessianError, match=r"experts\.3"):
        factor_rows(torch.zeros(3, 32), 0.1, 32, "experts.3")
    with pytest.raises(NonFiniteError, match=r"experts\.3"):
        factor_rows(torch.full((3, 32), 1e30), 0.1, 32, "experts.3")


@pytest.mark.parametrize(("base", "residual"), [(1, 0), (1, 1), (2, 1), (2, 2)])
def test_the_refit_by_rows_is_the_refit_under_their_hessian(correlated_inputs, base, residual):
    settings = LayerSettings(block_size=32, base_planes=base, residual_planes=residual)
    out, width, planes = 6, 80, base + residual
    salient = (torch.arange(width) % 6 == 1) & torch.tensor(bool(residual))
    signs = [drawn(out, width, seed=p).sign() for p in range(planes)]
    for sign in signs[base:]:
        sign[:, ~salient] = 0
    column = torch.rand(width, generator=torch.Generator().manual_seed(1)) + 0.5
    fit = WeightFit(signs, salient, drawn(planes, 3, out, seed=3), column, settings)
    factored = factor_rows(correlated_inputs(30, width), 0.1, 32)
    target = drawn(out, width, seed=9)
    outputs, wanted = RowOutputs.of(fit, factored), target @ factored.rows.T
    H = factored.hessian
    expected = refit_row_scale(signs, column, target @ H, H, 32)
    torch.testing.assert_close(refit_by_rows(fit, outputs, target, wanted, factored), expected, rtol=1e-3, atol=1e-4)
    missed = (target - fit.dequantize()) @ factored.rows.T
    torch.testing.assert_close(outputs.missed(fit, wanted), missed, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(fit.block(2), fit.dequantize()[:, 64:])
