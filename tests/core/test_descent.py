import itertools

import numpy as np
import pytest
import torch

from optimum_sab.core.descent import descend_signs
from optimum_sab.core.hessian import damped

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
    return signs, salient, row_scale, column, target, damped(inputs.T @ inputs / len(inputs), 0.01)


def dense(signs, row_scale, column):
    """Ŵ in double precision."""
    block = torch.arange(len(column)) // BLOCK
    total = sum(sign.double() * row_scale[p].double()[block].T for p, sign in enumerate(signs))
    return (total * column.double()).numpy()


def error(value, target, hessian):
    """Per row, in double precision."""
    difference = target.double().numpy() - value
    return np.einsum("ij,jk,ik->i", difference, hessian.double().numpy(), difference)


def naive_sweep(signs, salient, row_scale, column, target, hessian, base):
    """Column after column, every level tried with the whole error recomputed."""
    signs = [sign.double().clone() for sign in signs]
    for j in range(len(column)):
        active = len(signs) if salient[j] else base
        for i in range(target.shape[0]):
            outcomes = []
            for choice in itertools.product((-1.0, 1.0), repeat=active):
                for p, sign in enumerate(choice):
                    signs[p][i, j] = sign
                outcomes.append((error(dense(signs, row_scale, column), target, hessian)[i], choice))
            for p, sign in enumerate(min(outcomes)[1]):
                signs[p][i, j] = sign
    return signs


@pytest.mark.parametrize("planes", PLANES)
def test_descent_takes_the_best_level_of_every_column_by_brute_force(planes, correlated_inputs):
    signs, *rest = problem(correlated_inputs(80, 40), planes)
    expected = naive_sweep(signs, *rest, planes[0])
    descend_signs(signs, *rest, BLOCK, planes[0])
    for found, best in zip(signs, expected):
        assert torch.equal(found.double(), best)


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("seed", range(3))
def test_descent_never_raises_the_error(planes, seed, correlated_inputs):
    signs, salient, row_scale, column, target, hessian = problem(correlated_inputs(200, 75, seed), planes, 8, seed)
    history = [error(dense(signs, row_scale, column), target, hessian)]
    for _ in range(5):
        descend_signs(signs, salient, row_scale, column, target, hessian, BLOCK, planes[0])
        history.append(error(dense(signs, row_scale, column), target, hessian))
    for before, after in zip(history, history[1:]):
        assert (after <= before * (1 + 1e-6)).all()
    assert (history[-1] < history[0]).all()


def test_descent_ends_where_no_single_change_lowers_the_error(correlated_inputs):
    signs, salient, row_scale, column, target, hessian = problem(correlated_inputs(80, 40), (2, 0))
    for _ in range(40):
        before = [sign.clone() for sign in signs]
        descend_signs(signs, salient, row_scale, column, target, hessian, BLOCK, 2)
        if all(torch.equal(a, b) for a, b in zip(before, signs)):
            break
    else:
        pytest.fail("the signs did not settle")
    least = error(dense(signs, row_scale, column), target, hessian)
    for p, i, j in itertools.product(range(2), range(3), range(40)):
        signs[p][i, j] *= -1
        assert error(dense(signs, row_scale, column), target, hessian)[i] >= least[i] * (1 - 1e-6)
        signs[p][i, j] *= -1


def test_descent_leaves_residual_planes_off_the_other_columns(correlated_inputs):
    signs, salient, *rest = problem(correlated_inputs(80, 40), (1, 1))
    descend_signs(signs, salient, *rest, BLOCK, 1)
    assert signs[0].abs().eq(1).all()
    assert torch.equal(signs[1].abs(), salient.float().expand(3, 40))


def test_descent_is_not_disturbed_by_a_dead_column(correlated_inputs):
    inputs = correlated_inputs(80, 33)
    inputs[:, 32] = 0  # the last column, alone in its block
    signs, salient, row_scale, column, target, hessian = problem(inputs, (1, 1))
    column[32], target[:, 32] = 0, 0
    without = [sign[:, :32].clone() for sign in signs]
    descend_signs(signs, salient, row_scale, column, target, hessian, BLOCK, 1)
    descend_signs(without, salient[:32], row_scale[:, :1], column[:32], target[:, :32], hessian[:32, :32], BLOCK, 1)
    for found, expected in zip(signs, without):
        assert torch.equal(found[:, :32], expected)
        assert found.isfinite().all()
