import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from optimum_sab.core.alternating import fit_block, objective
from optimum_sab.core.planes import (
    BinaryPlanes,
    BlockFit,
    block_bounds,
    sign_combinations,
)
from optimum_sab.core.settings import LayerSettings

bounded = hypothesis.settings(max_examples=30, deadline=None, derandomize=True)

PLANES = [(1, 0), (1, 1), (2, 0), (2, 1)]
VECTOR, MAP = "vector", "map"


def settings_of(planes, iterations=10):
    return LayerSettings(base_planes=planes[0], residual_planes=planes[1], iterations=iterations)


def problem(seed, out=5, width=24, rows=VECTOR, salient=5):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    weight *= torch.rand(width, generator=generator) + 0.3
    significance = torch.rand(1 if rows == VECTOR else out, width, generator=generator) + 0.05
    mask = torch.zeros(width, dtype=torch.bool)
    mask[torch.randperm(width, generator=generator)[:salient]] = True
    return weight, significance, mask


def naive_fit(weight, significance, salient, base, planes, iterations):
    """The alternation of method.md section 5 in double precision, one entry at a time."""
    out, width = weight.shape
    W = weight.double().tolist()
    weigh = significance.double().expand(out, width).tolist()
    active = [planes if s else base for s in salient.tolist()]
    rows, cols = range(out), range(width)

    c = [sum(abs(W[i][j]) for i in rows) / out for j in cols]
    mean = sum(c) / width
    c = [x / mean for x in c]
    rest = [[W[i][j] / c[j] for j in cols] for i in rows]
    a = [[0.0] * out for _ in range(planes)]
    B = [[[0.0] * width for _ in rows] for _ in range(planes)]
    for p in range(planes):
        support = [j for j in cols if p < active[j]]
        for i in rows:
            a[p][i] = sum(abs(rest[i][j]) for j in support) / len(support)
            for j in support:
                B[p][i][j] = 1.0 if rest[i][j] >= 0 else -1.0
                rest[i][j] -= a[p][i] * B[p][i][j]

    for _ in range(iterations):
        for i in rows:  # row scales: least squares over the planes
            basis = np.array([[np.sqrt(weigh[i][j]) * c[j] * B[p][i][j] for p in range(planes)] for j in cols])
            wanted = np.array([np.sqrt(weigh[i][j]) * W[i][j] for j in cols])
            best = np.linalg.lstsq(basis, wanted, rcond=None)[0]
            for p in range(planes):
                a[p][i] = best[p]
        for j in cols:  # column scales: one unknown each
            value = [sum(a[p][i] * B[p][i][j] for p in range(planes)) for i in rows]
            below = sum(weigh[i][j] * value[i] ** 2 for i in rows)
            if below > 0:
                c[j] = sum(weigh[i][j] * value[i] * W[i][j] for i in rows) / below
        for i in rows:  # signs: the nearest of the levels
            for j in cols:
                levels = []
                for code in range(2 ** active[j]):
                    signs = [1.0 if code >> p & 1 else -1.0 for p in range(active[j])]
                    levels.append((abs(W[i][j] - c[j] * sum(s * a[p][i] for p, s in enumerate(signs))), signs))
                for p, sign in enumerate(min(levels)[1]):
                    B[p][i][j] = sign
    norm = sum(abs(x) for x in c) / width
    return np.array(a) * norm, np.array(c) / norm, np.array(B)


@bounded
@hypothesis.given(st.integers(1, 700), st.sampled_from([32, 64, 128]))
def test_block_bounds_cover_every_column_once(width, block):
    bounds = block_bounds(width, block)
    assert [j for start, end in bounds for j in range(start, end)] == list(range(width))
    assert all(end - start == block for start, end in bounds[:-1])
    assert all(start % block == 0 for start, _ in bounds)


def test_sign_combinations_count_in_binary():
    assert sign_combinations(1).tolist() == [[-1], [1]]
    assert sign_combinations(2).tolist() == [[-1, -1], [1, -1], [-1, 1], [1, 1]]
    assert len({tuple(row) for row in sign_combinations(4).tolist()}) == 16


@pytest.mark.parametrize("planes", [*PLANES, (2, 2)])
def test_dequantize_equals_the_format_s_equation(planes):
    base, residual = planes
    out, width, block = 3, 41, 32
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor([2, 17, 31, 33, 40]) if residual else torch.zeros(0, dtype=torch.int64)
    binary = BinaryPlanes(
        base_sign=torch.rand(base, out, width, generator=generator) < 0.5,
        residual_sign=torch.rand(residual, out, len(index), generator=generator) < 0.5,
        residual_index=index,
        row_scale=torch.randn(base + residual, 2, out, generator=generator),
        column_scale=torch.randn(width, generator=generator),
        block_size=block,
    )
    dense = binary.dequantize()
    assert (dense.shape, dense.dtype) == ((out, width), torch.float32)
    for i in range(out):
        for j in range(width):
            k = j // block
            value = sum(binary.row_scale[p, k, i] * (1 if binary.base_sign[p, i, j] else -1) for p in range(base))
            if j in index.tolist():
                s = index.tolist().index(j)
                for r in range(residual):
                    value += binary.row_scale[base + r, k, i] * (1 if binary.residual_sign[r, i, s] else -1)
            assert float(dense[i, j]) == pytest.approx(float(binary.column_scale[j] * value), rel=1e-5, abs=1e-6)


def test_split_gives_back_the_rows_of_the_stack():
    generator = torch.Generator().manual_seed(0)
    stack = BinaryPlanes(
        base_sign=torch.rand(2, 7, 40, generator=generator) < 0.5,
        residual_sign=torch.rand(1, 7, 3, generator=generator) < 0.5,
        residual_index=torch.tensor([0, 5, 39]),
        row_scale=torch.randn(3, 2, 7, generator=generator),
        column_scale=torch.randn(40, generator=generator),
        block_size=32,
    )
    parts = stack.split([4, 1, 2])
    assert [part.out_features for part in parts] == [4, 1, 2]
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), stack.dequantize())


def test_objective_is_the_weighted_squared_error():
    weight, significance, _ = problem(0, rows=MAP)
    fit = BlockFit(
        row_scale=torch.tensor([[0.5] * 5, [0.2] * 5]),
        column_scale=torch.linspace(0.5, 1.5, 24),
        sign=torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).sign(),
        salient=torch.ones(24, dtype=torch.bool),
    )
    expected = 0.0
    for i in range(5):
        for j in range(24):
            value = float(fit.column_scale[j]) * (0.5 * float(fit.sign[0, i, j]) + 0.2 * float(fit.sign[1, i, j]))
            expected += float(significance[i, j]) * (float(weight[i, j]) - value) ** 2
    assert float(objective(weight, fit, significance)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [VECTOR, MAP])
@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("iterations", [1, 3])
def test_fit_block_takes_the_steps_of_the_naive_alternation(planes, rows, iterations):
    weight, significance, salient = problem(3, rows=rows)
    fit = fit_block(weight, significance, salient, settings_of(planes, iterations))
    row, column, sign = naive_fit(weight, significance, salient, planes[0], sum(planes), iterations)
    assert np.array_equal(fit.sign.numpy(), sign)
    np.testing.assert_allclose(fit.row_scale.numpy(), row, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(fit.column_scale.numpy(), column, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [VECTOR, MAP])
@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("seed", range(4))
def test_fit_block_objective_never_rises(planes, rows, seed):
    weight, significance, salient = problem(seed, out=12, width=32, rows=rows)
    history = [
        float(objective(weight, fit_block(weight, significance, salient, settings_of(planes, n)), significance))
        for n in range(1, 13)
    ]
    assert all(after <= before * (1 + 1e-5) for before, after in zip(history, history[1:]))
    assert history[-1] < history[0]


@pytest.mark.parametrize("planes", PLANES)
def test_fit_block_puts_residual_signs_on_salient_columns_only(planes):
    weight, significance, salient = problem(0)
    fit = fit_block(weight, significance, salient, settings_of(planes))
    base = planes[0]
    assert torch.equal(fit.sign[:base].abs(), torch.ones(base, 5, 24))
    assert torch.equal(fit.sign[base:].abs(), salient.float().expand(planes[1], 5, 24))


def test_fit_block_normalises_the_column_scales_to_mean_one():
    weight, significance, salient = problem(0)
    assert float(fit_block(weight * 1e3, significance, salient, settings_of((1, 1))).column_scale.abs().mean()) == (
        pytest.approx(1.0)
    )


def test_fit_block_recovers_a_weight_that_is_one_plane():
    generator = torch.Generator().manual_seed(0)
    row, column = torch.rand(6, 1, generator=generator) + 0.2, torch.rand(32, generator=generator) + 0.2
    weight = row * column * torch.randn(6, 32, generator=generator).sign()
    fit = fit_block(weight, torch.ones(1, 32), torch.zeros(32, dtype=torch.bool), settings_of((1, 0)))
    torch.testing.assert_close(fit.dequantize(), weight, rtol=1e-5, atol=1e-6)


def dead_column_problem(seed):
    weight, significance, salient = problem(seed)
    dead = int((~salient).nonzero()[3])
    weight[:, dead] = 0
    significance[:, dead] = 0
    return weight, significance, salient, dead, torch.arange(24) != dead


def test_fit_block_of_a_dead_column_leaves_the_others_as_without_it():
    weight, significance, salient, _, keep = dead_column_problem(5)
    fit = fit_block(weight, significance, salient, settings_of((1, 0)))
    without = fit_block(weight[:, keep], significance[:, keep], salient[keep], settings_of((1, 0)))
    assert torch.equal(fit.sign[:, :, keep], without.sign)
    torch.testing.assert_close(fit.dequantize()[:, keep], without.dequantize(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("planes", PLANES)
def test_fit_block_of_a_dead_column_is_zero_there_and_as_good_as_without_it(planes):
    """Not the same fit: the column counts in the means that the planes start from. On average it costs nothing."""
    errors = np.zeros(2)
    for seed in range(10):
        weight, significance, salient, dead, keep = dead_column_problem(seed)
        fit = fit_block(weight, significance, salient, settings_of(planes))
        without = fit_block(weight[:, keep], significance[:, keep], salient[keep], settings_of(planes))
        assert not fit.dequantize()[:, dead].any()
        errors[0] += float(objective(weight, fit, significance))
        errors[1] += float(objective(weight[:, keep], without, significance[:, keep]))
    assert errors[0] <= 1.05 * errors[1]


@pytest.mark.parametrize("planes", PLANES)
def test_fit_block_of_a_column_without_significance_leaves_the_others_finite_and_itself_close(planes):
    weight, significance, salient = problem(5)
    significance[:, 7] = 0
    fit = fit_block(weight, significance, salient, settings_of(planes))
    assert fit.dequantize().isfinite().all()
    assert fit.column_scale[7] > 0


@pytest.mark.parametrize("planes", [*PLANES, (4, 0), (1, 3)])
def test_fit_block_of_zero_rows_gives_exact_zeros_there(planes):
    weight, significance, salient = problem(6)
    weight[[0, 3]] = 0
    fit = fit_block(weight, significance, salient, settings_of(planes))
    assert not fit.dequantize()[[0, 3]].any()
    assert not fit.row_scale[:, [0, 3]].any()
    assert float(objective(weight, fit, significance)) < float((significance * weight.square()).sum())


@pytest.mark.parametrize("planes", [*PLANES, (4, 0), (1, 3)])
def test_fit_block_of_an_all_zero_block_is_zero(planes):
    fit = fit_block(torch.zeros(3, 8), torch.ones(1, 8), torch.arange(8) < 2, settings_of(planes))
    assert not fit.dequantize().any()
    assert fit.row_scale.isfinite().all()
    assert fit.column_scale.isfinite().all()


@bounded
@hypothesis.given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(1, 12),
    st.sampled_from([*PLANES, (4, 0), (3, 1), (2, 2), (1, 3)]),
    st.floats(-20, 15),
)
def test_fit_block_of_coarse_weights_stays_finite_at_any_magnitude(seed, out, width, planes, magnitude):
    """Integers repeat: planes coincide, levels tie and rows are fitted exactly by fewer planes than there are."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-1, 2, (out, width), generator=generator).float() * 10**magnitude
    salient = torch.arange(width) < settings_of(planes).salient_columns(width)
    fit = fit_block(weight, torch.ones(1, width), salient, settings_of(planes))
    assert fit.row_scale.isfinite().all()
    assert fit.column_scale.isfinite().all()
    error = (weight - fit.dequantize()).double().square().sum()
    assert error <= weight.double().square().sum() * (1 + 1e-5)


@pytest.mark.parametrize("planes", [(1, 1), (2, 1)])
@pytest.mark.parametrize("count", [0, 24])
def test_fit_block_handles_no_and_only_salient_columns(planes, count):
    weight, significance, _ = problem(7)
    salient = torch.arange(24) < count
    fit = fit_block(weight, significance, salient, settings_of(planes))
    row, column, sign = naive_fit(weight, significance, salient, planes[0], planes[0] + (planes[1] if count else 0), 10)
    expected = np.einsum("pi,pij,j->ij", row, sign, column)
    np.testing.assert_allclose(fit.dequantize().numpy(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("code", ["none", "trellis16"])
@pytest.mark.parametrize("some", [slice(None, None, 3), slice(2, 5)])
def test_rows_are_those_of_the_dense_weight(some, code):
    generator = torch.Generator().manual_seed(0)
    planes = BinaryPlanes(
        torch.rand(2, 11, 40, generator=generator) > 0.5,
        torch.rand(1, 11, 6, generator=generator) > 0.5,
        torch.tensor([1, 5, 9, 17, 33, 38]),
        torch.randn(3, 3, 11, generator=generator),
        torch.rand(40, generator=generator),
        16,
        code,
    )
    assert torch.equal(planes.rows(some).dequantize(), planes.dequantize()[some])
