import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from optimum_sab.core.factorization import factor_hessian
from optimum_sab.core.feedback import LevelPicker, block_feedback, column_feedback
from optimum_sab.core.planes import BlockFit

bounded = hypothesis.settings(max_examples=30, deadline=None, derandomize=True)

PLANES = [(1, 0), (1, 1), (2, 0), (2, 1)]


def levels(row_scale, column_scale, active):
    """Every (value, signs) a row can take in one column."""
    for signs in itertools.product((-1.0, 1.0), repeat=active):
        yield float(column_scale) * sum(s * float(a) for s, a in zip(signs, row_scale)), signs


def problem(seed, inputs, planes=(1, 1), out=4):
    """A weight, a fit whose signs are still unset, and the factored Hessian of the inputs."""
    generator = torch.Generator().manual_seed(seed)
    width = inputs.shape[1]
    weight = torch.randn(out, width, generator=generator)
    salient = torch.zeros(width, dtype=torch.bool)
    salient[:: max(1, width // 3)] = bool(planes[1])
    size = torch.tensor([0.8, 0.45, 0.2])[: sum(planes), None]
    fit = BlockFit(
        row_scale=size * (0.7 + 0.6 * torch.rand(sum(planes), out, generator=generator)),
        column_scale=0.7 + 0.6 * torch.rand(width, generator=generator),
        sign=torch.zeros(sum(planes), out, width),
        salient=salient,
    )
    return weight, fit, factor_hessian(inputs.T @ inputs / len(inputs), 0.01)


def naive_feedback(weight, fit, hessian, base):
    """Optimal brain quantization with fixed levels: after every column the rest is re-solved from H itself.

    With the columns from j on still free, ``w_rest −= e_j · [H_F⁻¹]_rest,j / [H_F⁻¹]_jj`` minimises the output error.
    """
    H = hessian.double().numpy()
    W = weight.double().numpy().copy()
    out, width = W.shape
    signs = np.zeros(fit.sign.shape)
    errors = np.zeros_like(W)
    for j in range(width):
        inverse = np.linalg.inv(H[j:, j:])
        active = fit.row_scale.shape[0] if fit.salient[j] else base
        for i in range(out):
            choices = levels(fit.row_scale[:, i], fit.column_scale[j], active)
            value, chosen = min(choices, key=lambda choice: abs(W[i, j] - choice[0]))
            signs[:active, i, j] = chosen
            errors[i, j] = (W[i, j] - value) / np.sqrt(inverse[0, 0])
            W[i, j + 1 :] -= (W[i, j] - value) * inverse[0, 1:] / inverse[0, 0]
            W[i, j] = value
    return signs, errors


@bounded
@hypothesis.given(st.integers(0, 10**6), st.sampled_from(PLANES), st.booleans(), st.floats(-2.0, 2.0))
def test_level_picker_takes_the_nearest_level(seed, planes, salient, column_scale):
    generator = torch.Generator().manual_seed(seed)
    row_scale = torch.randn(sum(planes), 9, generator=generator)  # of both signs, as after a refit
    column = torch.randn(9, generator=generator)
    scale = torch.tensor(column_scale)
    signs, value = LevelPicker(row_scale, planes[0]).pick(column, scale, salient)
    active = sum(planes) if salient else planes[0]
    assert signs.shape == (active, 9)
    assert signs.abs().eq(1).all()
    torch.testing.assert_close(value, scale * (signs * row_scale[:active]).sum(0), rtol=1e-5, atol=1e-6)
    for i in range(9):
        nearest = min(abs(float(column[i]) - v) for v, _ in levels(row_scale[:, i], scale, active))
        assert abs(float(column[i] - value[i])) == pytest.approx(nearest, abs=1e-5)


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("seed", range(3))
def test_column_feedback_equals_re_solving_the_rest_after_every_column(planes, seed, correlated_inputs):
    weight, fit, factored = problem(seed, correlated_inputs(60, 24, seed), planes)
    before = weight.clone()
    errors = column_feedback(weight, fit, factored.inverse_factor, planes[0])
    signs, expected = naive_feedback(weight, fit, factored.hessian, planes[0])
    assert np.array_equal(fit.sign.numpy(), signs)
    np.testing.assert_allclose(errors.numpy(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("planes", PLANES)
def test_column_feedback_errors_add_up_to_the_output_error(planes, correlated_inputs):
    """Every column's scaled error squared is what the best continuation loses by it: their sum is tr(E H Eᵀ)."""
    weight, fit, factored = problem(0, correlated_inputs(60, 24), planes)
    errors = column_feedback(weight, fit, factored.inverse_factor, planes[0]).double()
    difference = (weight - fit.dequantize()).double()
    total = (difference @ factored.hessian.double() * difference).sum()
    torch.testing.assert_close(errors.square().sum(), total, rtol=1e-4, atol=0)


@pytest.mark.parametrize("planes", [(1, 1), (2, 0)])
def test_column_feedback_takes_the_level_with_the_best_real_valued_continuation(planes, correlated_inputs):
    """Brute force: for every level of a column, solve for the best real values of all later columns."""
    width = 5
    weight, fit, factored = problem(1, correlated_inputs(30, width), planes, out=3)
    column_feedback(weight, fit, factored.inverse_factor, planes[0])
    root = np.linalg.cholesky(factored.hessian.double().numpy()).T  # ‖root · e‖² = e H eᵀ
    stored = fit.dequantize().double().numpy()
    for i in range(3):
        row = weight[i].double().numpy()
        for j in range(width):
            active = sum(planes) if fit.salient[j] else planes[0]
            outcomes = []
            for value, signs in levels(fit.row_scale[:, i], fit.column_scale[j], active):
                fixed = np.append(stored[i, :j], value)
                pull = root[:, : j + 1] @ (row[: j + 1] - fixed)
                rest = np.linalg.lstsq(root[:, j + 1 :], -pull, rcond=None)[0]
                outcomes.append((np.sum((pull + root[:, j + 1 :] @ rest) ** 2), signs))
            assert tuple(fit.sign[:active, i, j].tolist()) == min(outcomes)[1]


def test_column_feedback_without_correlation_rounds_every_column_by_itself():
    weight, fit, _ = problem(0, torch.eye(12), (1, 1))
    diagonal = torch.rand(12, generator=torch.Generator().manual_seed(3)) + 0.5
    errors = column_feedback(weight, fit, torch.diag(diagonal), 1)
    picker = LevelPicker(fit.row_scale, 1)
    for j in range(12):
        signs, value = picker.pick(weight[:, j], fit.column_scale[j], bool(fit.salient[j]))
        assert torch.equal(fit.sign[: len(signs), :, j], signs)
        torch.testing.assert_close(errors[:, j], (weight[:, j] - value) / diagonal[j])


@pytest.mark.parametrize("planes", [(1, 1), (2, 1)])
def test_column_feedback_leaves_residual_signs_off_the_other_columns(planes, correlated_inputs):
    weight, fit, factored = problem(0, correlated_inputs(60, 24), planes)
    column_feedback(weight, fit, factored.inverse_factor, planes[0])
    assert not fit.sign[planes[0] :, :, ~fit.salient].any()
    assert fit.sign[:, :, fit.salient].abs().eq(1).all()


def test_block_feedback_scales_the_errors_and_keeps_the_signs(correlated_inputs):
    weight, fit, factored = problem(0, correlated_inputs(60, 24))
    fit.sign = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(5)).sign()
    fit.sign[1, :, ~fit.salient] = 0
    before = fit.sign.clone()
    errors = block_feedback(weight, fit, factored.inverse_factor)
    assert torch.equal(fit.sign, before)
    for i in range(4):
        for j in range(24):
            value = sum(float(fit.row_scale[p, i] * before[p, i, j]) for p in range(2)) * float(fit.column_scale[j])
            expected = (float(weight[i, j]) - value) / float(factored.inverse_factor[j, j])
            assert float(errors[i, j]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
