import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from optimum_sab.core.descent import descend_signs
from optimum_sab.core.factorization import damped
from optimum_sab.core.planes import WeightFit
from optimum_sab.core.settings import LayerSettings

BLOCK = 32
PLANES = [(1, 0), (1, 1), (2, 0), (2, 1)]


def problem(inputs, planes=(1, 1), out=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = inputs.shape[1]
    blocks = -(-width // BLOCK)
    salient = (torch.arange(width) % 7 == 2) & torch.tensor(bool(planes[1]))
    signs = [torch.randn(out, width, generator=generator).sign() for _ in range(sum(planes))]
    for sign in signs[planes[0] :]:
        sign[:, ~salient] = 0
    size = torch.tensor([0.8, 0.4, 0.2])[: sum(planes), None, None]
    row_scale = size * (0.6 + 0.8 * torch.rand(sum(planes), blocks, out, generator=generator))
    column = torch.rand(width, generator=generator) + 0.5
    target = torch.randn(out, width, generator=generator)
    settings = LayerSettings(block_size=BLOCK, base_planes=planes[0], residual_planes=planes[1])
    fit = WeightFit(signs, salient, row_scale, column, settings)
    return fit, target, damped(inputs.T @ inputs / len(inputs), 0.01)


def dense(fit):
    """Ŵ in double precision."""
    block = torch.arange(len(fit.column_scale)) // BLOCK
    total = sum(sign.double() * fit.row_scale[p].double()[block].T for p, sign in enumerate(fit.signs))
    return (total * fit.column_scale.double()).numpy()


def error(fit, target, hessian):
    """Per row, in double precision."""
    difference = target.double().numpy() - dense(fit)
    return np.einsum("ij,jk,ik->i", difference, hessian.double().numpy(), difference)


def naive_sweep(fit, target, hessian):
    """Column after column, every level tried with the whole error recomputed."""
    fit = replace(fit, signs=[sign.double() for sign in fit.signs])
    signs = fit.signs
    for j in range(len(fit.column_scale)):
        active = len(signs) if fit.salient[j] else fit.settings.base_planes
        for i in range(target.shape[0]):
            outcomes = []
            for choice in itertools.product((-1.0, 1.0), repeat=active):
                for p, sign in enumerate(choice):
                    signs[p][i, j] = sign
                outcomes.append((error(fit, target, hessian)[i], choice))
            for p, sign in enumerate(min(outcomes)[1]):
                signs[p][i, j] = sign
    return signs


@pytest.mark.parametrize("planes", PLANES)
def test_descent_takes_the_best_level_of_every_column_by_brute_force(planes, correlated_inputs):
    fit, target, hessian = problem(correlated_inputs(80, 40), planes)
    expected = naive_sweep(fit, target, hessian)
    descend_signs(fit, target, hessian)
    for found, best in zip(fit.signs, expected):
        assert torch.equal(found.double(), best)


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("seed", range(3))
def test_descent_never_raises_the_error(planes, seed, correlated_inputs):
    fit, target, hessian = problem(correlated_inputs(200, 75, seed), planes, 8, seed)
    history = [error(fit, target, hessian)]
    for _ in range(5):
        descend_signs(fit, target, hessian)
        history.append(error(fit, target, hessian))
    for before, after in zip(history, history[1:]):
        assert (after <= before * (1 + 1e-6)).all()
    assert (history[-1] < history[0]).all()


def test_descent_ends_where_no_single_change_lowers_the_error(correlated_inputs):
    fit, target, hessian = problem(correlated_inputs(80, 40), (2, 0))
    for _ in range(40):
        before = [sign.clone() for sign in fit.signs]
        descend_signs(fit, target, hessian)
        if all(torch.equal(a, b) for a, b in zip(before, fit.signs)):
            break
    else:
        pytest.fail("the signs did not settle")
    least = error(fit, target, hessian)
    for p, i, j in itertools.product(range(2), range(3), range(40)):
        fit.signs[p][i, j] *= -1
        assert error(fit, target, hessian)[i] >= least[i] * (1 - 1e-6)
        fit.signs[p][i, j] *= -1


def test_descent_leaves_residual_planes_off_the_other_columns(correlated_inputs):
    fit, target, hessian = problem(correlated_inputs(80, 40), (1, 1))
    descend_signs(fit, target, hessian)
    assert fit.signs[0].abs().eq(1).all()
    assert torch.equal(fit.signs[1].abs(), fit.salient.float().expand(3, 40))


def test_descent_is_not_disturbed_by_a_dead_column(correlated_inputs):
    inputs = correlated_inputs(80, 33)
    inputs[:, 32] = 0  # the last column, alone in its block
    fit, target, hessian = problem(inputs, (1, 1))
    fit.column_scale[32], target[:, 32] = 0, 0
    signs = [sign[:, :32].clone() for sign in fit.signs]
    without = WeightFit(signs, fit.salient[:32], fit.row_scale[:, :1], fit.column_scale[:32], fit.settings)
    descend_signs(fit, target, hessian)
    descend_signs(without, target[:, :32], hessian[:32, :32])
    for found, expected in zip(fit.signs, without.signs):
        assert torch.equal(found[:, :32], expected)
        assert found.isfinite().all()
