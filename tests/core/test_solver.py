import itertools
import math

import numpy as np
import pytest
import torch

from optimum_sab.core import solver
from optimum_sab.core.hessian import InputMoments, InputStatistics
from optimum_sab.core.row_scale import round_row_scale
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import output_error, solve
from optimum_sab.core.target import cross_validated_alpha
from optimum_sab.errors import CalibrationError, NonFiniteError, SingularHessianError

SMALL = LayerSettings(block_size=32, propagation=0.3)
PAPER = LayerSettings(
    block_size=32,
    base_planes=2,
    iterations=15,
    significance="modality",
    feedback="block",
    refit=False,
    sweeps=0,
    row_scale="fp16",
    propagation=0.0,
)


def random_weight(out, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, width, generator=generator) * (torch.rand(width, generator=generator) + 0.5)


def plain_statistics(hessian):
    return InputStatistics(hessian, {"text": hessian}, None, {"text": 1})


# --- the whole pipeline once more, as loops in double precision, written from the formulas and not from the product ---


def to_half(value):
    return float(np.float16(value))


def to_e4m3(value):
    """Nearest multiple of 2^-9 · 2^max(e, 0) with three binary digits after the leading one, ties to even."""
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))), -6)
    step = 2.0 ** (exponent - 3)
    return math.copysign(min(448.0, round(abs(value) / step) * step), value)


def naive_round(a, storage):
    """Row scales a [planes][blocks][out] as they are stored."""
    planes, blocks, out = a.shape
    result = np.zeros_like(a)
    for i in range(out):
        peak = np.abs(a[:, :, i]).max()
        exponent = 0
        while peak > 448 * 2.0**exponent:
            exponent += 1
        while 0 < peak <= 448 * 2.0 ** (exponent - 1):
            exponent -= 1
        for p, k in itertools.product(range(planes), range(blocks)):
            if storage == "fp8":
                result[p, k, i] = to_e4m3(a[p, k, i] / 2.0**exponent) * 2.0**exponent
            else:
                result[p, k, i] = to_half(a[p, k, i])
    return result


def naive_significance(weight, hessians, damping):
    """Λ [in] from full maps, normalised by their means."""
    maps = []
    for H in hessians:
        inverse = np.linalg.inv(H + damping * np.trace(H) / len(H) * np.eye(len(H)))
        one = np.array([[w**2 / inverse[j, j] ** 2 for j, w in enumerate(row)] for row in weight])
        maps.append(one / one.mean())
    z = len(maps)
    total = sum(maps)
    rho = np.zeros_like(total)
    for i, j in np.ndindex(*rho.shape):
        entry = [one[i, j] for one in maps]
        if z > 1:
            rho[i, j] = (math.sqrt(z) - sum(entry) / math.sqrt(sum(s * s for s in entry))) / (math.sqrt(z) - 1)
    salient = sorted(np.ndindex(*rho.shape), key=lambda at: -total[at])[: max(1, round(0.05 * rho.size))]
    cut = np.quantile([rho[at] for at in salient], 0.5) - 1e-9
    ratio = sum(total[at] for at in salient if rho[at] >= cut and rho[at] > 0.005) / total.sum()
    return (ratio * rho + (1 - ratio) * (1 - rho))[0]


def nearest(wanted, a, c, active):
    """Signs of the level ``c · Σ ±a`` nearest to a value; where planes are equal, the first in counting order."""
    choices = (signs[::-1] for signs in itertools.product((-1.0, 1.0), repeat=active))
    return min(choices, key=lambda signs: abs(wanted - c * sum(s * x for s, x in zip(signs, a))))


def naive_block(W, weigh, active, planes, iterations):
    out, width = W.shape
    mean = np.abs(W).mean(0)
    c = mean / mean.mean()
    rest = W / c
    a, B = np.zeros((planes, out)), np.zeros((planes, out, width))
    for p in range(planes):
        support = [j for j in range(width) if p < active[j]]
        for i in range(out):
            a[p, i] = sum(abs(rest[i, j]) for j in support) / max(1, len(support))
            for j in support:
                B[p, i, j] = 1.0 if rest[i, j] >= 0 else -1.0
                rest[i, j] -= a[p, i] * B[p, i, j]
    for _ in range(iterations):
        for i in range(out):
            root = np.sqrt(weigh)
            a[:, i] = np.linalg.lstsq((B[:, i] * c * root).T, W[i] * root, rcond=None)[0]
        for j in range(width):
            value = [sum(a[:, i] * B[:, i, j]) for i in range(out)]
            c[j] = sum(v * W[i, j] for i, v in enumerate(value)) / sum(v * v for v in value)
        for i, j in itertools.product(range(out), range(width)):
            B[: active[j], i, j] = nearest(W[i, j], a[:, i], c[j], active[j])
    norm = np.abs(c).mean()
    return a * norm, c / norm, B


def naive_refit(B, c, target, H, bounds):
    planes, out, width = B.shape
    a = np.zeros((planes, len(bounds), out))
    for i in range(out):
        basis = np.zeros((planes * len(bounds), width))
        for p, (k, (start, end)) in itertools.product(range(planes), enumerate(bounds)):
            basis[p * len(bounds) + k, start:end] = B[p, i, start:end] * c[start:end]
        gram = basis @ H @ basis.T
        gram += np.diag(1e-4 * np.diag(gram) + 1e-8 * np.diag(gram).max())
        a[:, :, i] = np.linalg.solve(gram, basis @ H @ target[i]).reshape(planes, len(bounds))
    return a


def dense(a, c, B, bounds):
    W = np.zeros(B.shape[1:])
    for p, (k, (start, end)) in itertools.product(range(len(B)), enumerate(bounds)):
        W[:, start:end] += a[p, k][:, None] * B[p, :, start:end] * c[start:end]
    return W


def naive_sweep(a, c, B, active, target, H, bounds):
    for k, (start, end) in enumerate(bounds):
        for j, i in itertools.product(range(start, end), range(len(target))):
            difference = target[i] - dense(a, c, B, bounds)[i]
            value = target[i, j] - difference[j]
            wanted = value + difference @ H[:, j] / H[j, j]
            B[: active[j], i, j] = nearest(wanted, a[:, k, i], c[j], active[j])


def naive_solve(weight, statistics, settings):
    """(a, c, B, active) of a weight without dead columns."""
    W = weight.double().numpy()
    out, width = W.shape
    H = statistics.hessian.double().numpy()
    H = H + settings.damping * np.trace(H) / width * np.eye(width)
    inverse = np.linalg.inv(H)
    target = W
    if statistics.drift is not None:
        target = W + settings.propagation * W @ statistics.drift.double().numpy() @ inverse
    if settings.significance == "modality":
        each = [h.double().numpy() for h in statistics.by_modality.values()]
        weigh = naive_significance(W, each, settings.damping) ** 2
    else:
        weigh = np.diag(H) if settings.significance == "hessian" else np.ones(width)

    block, planes = settings.block_size, settings.planes
    bounds = [(s, min(s + block, width)) for s in range(0, width, block)]
    a, c = np.zeros((planes, len(bounds), out)), np.zeros(width)
    B = np.zeros((planes, out, width))
    active = [settings.base_planes] * width
    rest = target.copy()
    for k, (start, end) in enumerate(bounds):
        # the variance of column j's input given all later ones: the U_jj² of the lineage
        given = [np.linalg.inv(H[j:, j:])[0, 0] for j in range(start, end)]
        score = [sum(rest[i, start + j] ** 2 / v for i in range(out)) for j, v in enumerate(given)]
        for j in sorted(range(end - start), key=lambda j: -score[j])[: settings.salient_columns(end - start)]:
            active[start + j] = planes
        own = active[start:end]
        scale, c[start:end], B[:, :, start:end] = naive_block(
            rest[:, start:end], weigh[start:end], own, planes, settings.iterations
        )
        c[start:end] = [to_half(x) for x in c[start:end]]
        a[:, k] = naive_round(scale[:, None], settings.row_scale)[:, 0]
        before = rest[:, start:end].copy()
        for j in range(start, end):
            free = np.linalg.inv(H[j:, j:])
            for i in range(out):
                if settings.feedback == "column":
                    B[: active[j], i, j] = nearest(rest[i, j], a[:, k, i], c[j], active[j])
                value = c[j] * sum(a[:, k, i] * B[:, i, j])
                if settings.feedback == "column":
                    rest[i, j + 1 :] -= (rest[i, j] - value) * free[0, 1:] / free[0, 0]
                else:
                    error = before[i, j - start] - value
                    rest[i, end:] -= error * free[0, end - j :] / free[0, 0]
    if settings.refit:
        for sweep in range(settings.sweeps + 1):
            if sweep:
                naive_sweep(a, c, B, active, target, H, bounds)
            a = naive_round(naive_refit(B, c, target, H, bounds), settings.row_scale)
    return a, c, B, active, dense(a, c, B, bounds), target


@pytest.fixture
def tiny(correlated_inputs, statistics_of):
    """A layer [6, width] under text and image tokens of two streams."""

    def make(width, seed=0):
        dense = {"text": correlated_inputs(150, width, seed), "visual": 2 * correlated_inputs(400, width, seed + 1)}
        quantized = {name: x + 0.1 * x.roll(1, 1) for name, x in dense.items()}
        return random_weight(6, width, seed), statistics_of(dense=dense, **quantized)

    return make


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(SMALL, id="default"),
        pytest.param(PAPER, id="paper"),
        pytest.param(
            SMALL.replace(significance="modality", base_planes=2, sweeps=2, propagation=0.0), id="two-and-one"
        ),
        pytest.param(SMALL.replace(residual_planes=0, row_scale="fp16", significance="uniform"), id="one"),
        pytest.param(SMALL.replace(feedback="block", salient_fraction=0.3, damping=0.1), id="block-feedback"),
    ],
)
@pytest.mark.parametrize("width", [96, 75])
def test_solve_equals_the_naive_pipeline(settings, width, tiny):
    weight, statistics = tiny(width)
    solution = solve(weight, statistics, settings)
    a, c, B, active, approximation, target = naive_solve(weight, statistics, settings)
    planes = solution.planes
    assert planes.residual_index.tolist() == [j for j in range(width) if active[j] > settings.base_planes]
    assert np.array_equal(planes.base_sign.numpy(), B[: settings.base_planes] > 0)
    residual = B[settings.base_planes :, :, planes.residual_index.numpy()]
    assert np.array_equal(planes.residual_sign.numpy(), residual > 0)
    # both round the scales; a scale near a tie may fall to the other side, so not bit for bit
    np.testing.assert_allclose(planes.column_scale.numpy(), c, rtol=2e-3)
    assert np.mean(~np.isclose(planes.row_scale.numpy(), a, rtol=2e-3)) < 0.02
    np.testing.assert_allclose(planes.dequantize().numpy(), approximation, rtol=0, atol=0.02)
    difference, H = target - approximation, statistics.hessian.double().numpy()
    error = np.trace(difference @ H @ difference.T) / np.trace(target @ H @ target.T)
    assert solution.error == pytest.approx(error, rel=1e-2)


# --- what it returns ---


def test_output_error_is_the_relative_error_of_the_outputs(correlated_inputs):
    inputs = correlated_inputs(50, 12)
    weight, other = random_weight(4, 12), random_weight(4, 12, 1)
    expected = float((inputs @ (weight - other).T).square().sum() / (inputs @ weight.T).square().sum())
    assert output_error(weight, other, inputs.T @ inputs) == pytest.approx(expected, rel=1e-4)
    assert output_error(weight, weight, inputs.T @ inputs) == 0.0
    assert output_error(weight, 0 * weight, inputs.T @ inputs) == pytest.approx(1.0)
    assert output_error(0 * weight, weight, inputs.T @ inputs) == 0.0


def test_solve_reports_the_error_of_what_it_returns(tiny):
    weight, statistics = tiny(96)
    solution = solve(weight, statistics, SMALL.replace(propagation=0.0))
    expected = output_error(weight, solution.planes.dequantize(), statistics.hessian)
    assert solution.error == pytest.approx(expected, rel=1e-6)
    assert 0 < solution.error < 1


@pytest.mark.parametrize("storage", ["fp8", "fp16"])
def test_solve_returns_scales_rounded_to_their_storage(storage, tiny):
    planes = solve(*tiny(96), SMALL.replace(row_scale=storage)).planes
    assert torch.equal(round_row_scale(planes.row_scale, storage), planes.row_scale)
    assert torch.equal(planes.column_scale.half().float(), planes.column_scale)


@pytest.mark.parametrize("significance", ["modality", "hessian", "uniform"])
def test_solve_returns_the_significance_map_where_it_was_used(significance, tiny):
    found = solve(*tiny(96), SMALL.replace(significance=significance)).significance
    assert (found is not None) == (significance == "modality")


def test_solve_is_deterministic_and_changes_no_input(tiny):
    weight, statistics = tiny(96)
    before = weight.clone(), statistics.hessian.clone(), statistics.drift.clone()
    first, second = solve(weight, statistics, SMALL), solve(weight, statistics, SMALL)
    assert torch.equal(first.planes.dequantize(), second.planes.dequantize())
    assert first.error == second.error
    for value, old in zip((weight, statistics.hessian, statistics.drift), before):
        assert torch.equal(value, old)


def test_solve_takes_a_parameter_in_bfloat16(tiny):
    weight, statistics = tiny(96)
    weight = weight.to(torch.bfloat16)
    found = solve(torch.nn.Parameter(weight), statistics, SMALL)
    assert torch.equal(found.planes.dequantize(), solve(weight.float(), statistics, SMALL).planes.dequantize())


@pytest.mark.parametrize("power", [-40, -7, 9, 40])
def test_solve_of_a_weight_times_a_power_of_two_is_the_same_times_it(power, tiny):
    weight, statistics = tiny(96)
    expected, found = solve(weight, statistics, SMALL).planes, solve(weight * 2.0**power, statistics, SMALL).planes
    assert torch.equal(found.base_sign, expected.base_sign)
    assert torch.equal(found.residual_sign, expected.residual_sign)
    assert torch.equal(found.column_scale, expected.column_scale)
    assert torch.equal(found.row_scale, expected.row_scale * 2.0**power)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_solve_does_not_depend_on_the_default_dtype(dtype, tiny):
    weight, statistics = tiny(96)
    expected = solve(weight, statistics, SMALL.replace(significance="modality")).planes.dequantize()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = solve(weight, statistics, SMALL.replace(significance="modality")).planes.dequantize()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, expected)


# --- what it refuses ---


def test_solve_refuses_a_weight_that_is_not_finite_and_names_the_module(tiny):
    weight, statistics = tiny(96)
    weight[3, 4] = math.nan
    with pytest.raises(NonFiniteError, match=r"layers\.0\.q_proj"):
        solve(weight, statistics, SMALL, "layers.0.q_proj")


def test_solve_refuses_a_hessian_that_is_not_finite_and_names_the_module():
    hessian = torch.eye(32)
    hessian[3, 4] = math.inf
    with pytest.raises(NonFiniteError, match=r"layers\.0\.q_proj"):
        solve(random_weight(2, 32), plain_statistics(hessian), SMALL, "layers.0.q_proj")


def test_solve_refuses_a_hessian_without_a_factor_and_names_the_module():
    hessian = torch.diag(torch.tensor([-5.0, *[1.0] * 31]))
    with pytest.raises(SingularHessianError, match=r"layers\.0\.q_proj"):
        solve(random_weight(2, 32), plain_statistics(hessian), SMALL.replace(damping=0.01), "layers.0.q_proj")


# --- dead columns and other corners ---


CORNERS = [SMALL, PAPER, SMALL.replace(base_planes=2, residual_planes=2), SMALL.replace(residual_planes=0)]


@pytest.mark.parametrize("settings", CORNERS)
def test_solve_stores_exact_zeros_in_dead_columns(settings, correlated_inputs, statistics_of):
    inputs = correlated_inputs(200, 96)
    dead = [0, 5, 33, 34, 95]
    inputs[:, dead] = 0
    solution = solve(random_weight(6, 96), statistics_of(text=inputs), settings)
    approximation = solution.planes.dequantize()
    assert approximation.isfinite().all()
    assert not approximation[:, dead].any()
    alive = torch.ones(96, dtype=torch.bool)
    alive[dead] = False
    assert (approximation[:, alive] != 0).all()
    assert 0 < solution.error < 0.9
    if settings.residual_planes:
        assert not set(solution.planes.residual_index.tolist()) & set(dead)


@pytest.mark.parametrize("feedback", ["column", "block"])
@pytest.mark.parametrize("dead", [slice(0, 32), slice(32, 64), slice(64, 96)])
def test_solve_with_a_dead_block_equals_solve_without_it(dead, feedback, correlated_inputs, statistics_of):
    """A whole block, so that the others keep their places; the damping is corrected for the mean diagonal."""
    inputs, weight = correlated_inputs(200, 96), random_weight(6, 96)
    inputs[:, dead] = 0
    keep = torch.ones(96, dtype=torch.bool)
    keep[dead] = False
    hessian = inputs.T @ inputs / 200
    settings = SMALL.replace(feedback=feedback, damping=0.03)
    found = solve(weight, plain_statistics(hessian), settings)
    without = solve(
        weight[:, keep], plain_statistics(hessian[keep][:, keep].contiguous()), settings.replace(damping=0.02)
    )
    approximation = found.planes.dequantize()
    assert not approximation[:, dead].any()
    assert torch.equal(found.planes.base_sign[:, :, keep], without.planes.base_sign)
    torch.testing.assert_close(approximation[:, keep], without.planes.dequantize(), rtol=1e-3, atol=1e-4)
    assert found.error == pytest.approx(without.error, rel=1e-3)


@pytest.mark.parametrize("settings", CORNERS)
def test_solve_of_zero_rows_stores_zeros_there(settings, tiny):
    weight, statistics = tiny(96)
    weight[[0, 4]] = 0
    solution = solve(weight, statistics, settings)
    approximation = solution.planes.dequantize()
    assert not approximation[[0, 4]].any()
    assert approximation[[1, 2, 3, 5]].abs().sum(1).min() > 0


@pytest.mark.parametrize("settings", CORNERS)
def test_solve_of_an_all_zero_weight_is_zero(settings, tiny):
    weight, statistics = tiny(75)
    solution = solve(0 * weight, statistics, settings)
    assert not solution.planes.dequantize().any()
    assert solution.error == 0.0


@pytest.mark.parametrize("settings", CORNERS)
def test_solve_of_constant_inputs_is_finite_and_keeps_the_output(settings, statistics_of):
    """Every token alike: the Hessian has rank one, and one number per row is all there is to keep."""
    inputs = (torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5).expand(20, 64)
    weight = random_weight(6, 64)
    solution = solve(weight, statistics_of(text=inputs.contiguous()), settings)
    assert solution.planes.dequantize().isfinite().all()
    assert solution.error < (0.01 if settings.refit else 0.5)


@pytest.mark.parametrize("settings", CORNERS)
@pytest.mark.parametrize(("out", "width"), [(1, 96), (6, 32), (6, 31), (6, 33), (6, 5), (3, 3), (1, 1), (2, 70)])
def test_solve_handles_every_shape(settings, out, width, correlated_inputs, statistics_of):
    weight = random_weight(out, width)
    solution = solve(weight, statistics_of(text=correlated_inputs(100, width)), settings)
    planes = solution.planes
    approximation = planes.dequantize()
    assert approximation.shape == (out, width)
    assert approximation.isfinite().all()
    assert planes.row_scale.shape == (settings.planes, -(-width // 32), out)
    assert planes.residual_index.numel() == sum(
        settings.salient_columns(min(32, width - start)) for start in range(0, width, 32)
    )
    assert solution.error < 0.7


def test_solve_of_a_block_wider_than_the_layer_equals_one_block(correlated_inputs, statistics_of):
    weight, statistics = random_weight(6, 32), statistics_of(text=correlated_inputs(100, 32))
    one, wide = (solve(weight, statistics, SMALL.replace(block_size=size)).planes for size in (32, 128))
    assert torch.equal(one.dequantize(), wide.dequantize())


# --- how good it is ---


@pytest.fixture
def layer(correlated_inputs, statistics_of):
    return random_weight(48, 256), statistics_of(text=correlated_inputs(2000, 256))


def error_of(layer, **changes):
    return solve(*layer, LayerSettings(block_size=64).replace(**changes)).error


@pytest.mark.parametrize("planes", [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_solve_with_column_feedback_and_refit_beats_the_lineage_by_a_tenth(planes, layer):
    planes = {"base_planes": planes[0], "residual_planes": planes[1]}
    ours = error_of(layer, feedback="column", refit=True, sweeps=0, **planes)
    lineage = error_of(layer, feedback="block", refit=False, sweeps=0, **planes)
    assert ours < 0.9 * lineage


@pytest.mark.parametrize("planes", [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_solve_with_a_sweep_is_no_worse_than_without(planes, layer):
    planes = {"base_planes": planes[0], "residual_planes": planes[1]}
    errors = [error_of(layer, sweeps=sweeps, **planes) for sweeps in (0, 1, 3)]
    assert errors[1] <= errors[0]
    assert errors[2] <= errors[1] * 1.001  # the row scales are rounded after every sweep


def test_solve_with_more_planes_is_better(layer):
    errors = [error_of(layer, base_planes=b, residual_planes=r) for b, r in ((1, 0), (1, 1), (2, 0), (2, 1), (3, 0))]
    assert errors == sorted(errors, reverse=True)


def test_solve_with_propagation_lowers_the_error_of_the_dense_outputs(correlated_inputs, statistics_of):
    dense = correlated_inputs(2000, 96)
    quantized = dense + 0.4 * correlated_inputs(2000, 96, 7)
    weight, statistics = random_weight(24, 96), statistics_of(dense={"text": dense}, text=quantized)
    wanted = dense @ weight.T
    errors = []
    for alpha in (0.0, 0.5, 1.0):
        approximation = solve(weight, statistics, SMALL.replace(base_planes=2, propagation=alpha)).planes.dequantize()
        errors.append(float((quantized @ approximation.T - wanted).square().sum()))
    assert errors == sorted(errors, reverse=True)


def test_solve_ignores_propagation_without_a_dense_stream(layer):
    assert error_of(layer, propagation=0.0) == error_of(layer, propagation=1.0)


def test_solve_without_a_set_propagation_takes_the_cross_validated_one(correlated_inputs):
    moments, part = (InputMoments(64, torch.device("cpu"), True, "layer") for _ in range(2))
    mixing = torch.eye(64) + 0.05 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    for seed, of in ((0, part), (1, moments)):
        quantized = correlated_inputs(300, 64, seed)
        of.add("text", quantized, quantized @ mixing)
    statistics = moments.statistics(part=part)
    weight = random_weight(16, 64)
    settings = SMALL.replace(propagation=None)
    found = solve(weight, statistics, settings)
    assert found.propagation == cross_validated_alpha(weight, statistics, settings.damping)
    assert 0.5 < found.propagation <= 1.0
    same = solve(weight, statistics, settings.replace(propagation=found.propagation))
    assert torch.equal(found.planes.dequantize(), same.planes.dequantize())


def test_solve_by_modality_without_hessians_of_each_says_what_is_missing():
    statistics = InputStatistics(torch.eye(64), {}, None, {"text": 1})
    with pytest.raises(CalibrationError, match=r"significance='modality' needs.*the\.linear"):
        solve(random_weight(16, 64), statistics, SMALL.replace(significance="modality"), "the.linear")


@pytest.mark.parametrize("propagation", [None, 0.3])
def test_solve_names_the_module_whose_hessian_cannot_be_factored(correlated_inputs, propagation):
    moments, part = (InputMoments(64, torch.device("cpu"), True, "layer") for _ in range(2))
    for seed, of in ((0, part), (1, moments)):
        of.add("text", correlated_inputs(90, 64, seed), correlated_inputs(90, 64, seed + 2))
    statistics = moments.statistics(part=part)
    for hessian in (statistics.hessian, statistics.half.hessian):
        hessian.diagonal()[:9] -= 1e3
    with pytest.raises(SingularHessianError, match=r"the Hessian of the\.linear"):
        solve(random_weight(16, 64), statistics, SMALL.replace(propagation=propagation), "the.linear")


def test_solve_propagates_nothing_where_it_cannot_be_validated(correlated_inputs, statistics_of):
    """A single sample has no other half."""
    quantized = correlated_inputs(300, 64)
    statistics = statistics_of(dense={"text": 1.1 * quantized}, text=quantized)
    assert statistics.drift is not None
    assert solve(random_weight(16, 64), statistics, SMALL.replace(propagation=None)).propagation == 0.0


def test_the_error_of_a_large_weight_is_that_of_rows_evenly_spread(correlated_inputs, monkeypatch):
    """And what is found is the same."""
    monkeypatch.setattr(solver, "WIDE", 32)
    inputs = correlated_inputs(200, 64)
    weight = torch.randn(90, 64, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.5, 2, 90)[:, None]
    moments = InputMoments(64, torch.device("cpu"), False, "layer")
    moments.add("text", inputs)
    statistics = moments.statistics()
    for refit in (True, False):
        settings = LayerSettings(block_size=32, refit=refit, sweeps=0)
        whole = solve(weight, statistics, settings)
        with monkeypatch.context() as patch:
            patch.setattr(solver, "JUDGED_ROWS", 30)
            some = solve(weight, statistics, settings)
        planes = some.planes.dequantize()
        assert torch.equal(planes, whole.planes.dequantize())
        expected = output_error(weight[::3], planes[::3], statistics.hessian)
        assert some.error == pytest.approx(expected, rel=1e-4) and some.error != pytest.approx(whole.error, rel=1e-4)
        assert some.error == pytest.approx(whole.error, rel=0.1)
