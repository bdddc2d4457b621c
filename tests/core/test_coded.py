import pytest
import torch

from optimum_sab.core.code import CODES, code_for, find_code
from optimum_sab.core.coded import _begin, _search_windows, coded_values
from optimum_sab.core.columns import IN_TORCH
from optimum_sab.core.factorization import damped, factor_hessian
from optimum_sab.core.fitting import fit_planes
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.problem import Problem
from optimum_sab.core.refit import refit_columns, refit_rows
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import output_error, solve
from optimum_sab.core.trellis import search_bits
from optimum_sab.format.packed_weight import PackedWeight

PLAIN = LayerSettings(block_size=128)
SETTINGS = [
    PLAIN,
    PLAIN.replace(residual_planes=0),
    PLAIN.replace(base_planes=2),
    PLAIN.replace(base_planes=3, residual_planes=0),
]


def weight_of(rows, width):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


def coded(settings):
    return settings.replace(code=code_for(settings.base_planes).name)


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=["1+1", "1+0", "2+1"])
def test_coded_planes_are_better_than_plain_ones_of_the_same_bits(settings, correlated_inputs, statistics_of):
    weight, statistics = weight_of(64, 160), statistics_of(text=correlated_inputs(900, 160))
    found = solve(weight, statistics, coded(settings))
    plain = solve(weight, statistics, settings.replace(sweeps=4))
    assert found.error < 0.93 * plain.error
    packed, as_plain = PackedWeight.pack(found.planes, coded(settings)), PackedWeight.pack(plain.planes, settings)
    assert packed.stored_bytes == as_plain.stored_bytes
    assert output_error(weight, packed.dequantize(), statistics.hessian) == pytest.approx(found.error, rel=1e-4)


@pytest.mark.parametrize("settings", SETTINGS, ids=["1+1", "1+0", "2+1", "3+0"])
@pytest.mark.parametrize("first", [0, 13])
def test_searching_windows_never_raises_the_error_of_a_row(settings, first, correlated_inputs, statistics_of):
    weight, statistics = weight_of(24, 150), statistics_of(text=correlated_inputs(700, 150))
    factored = factor_hessian(statistics.hessian, 0.1)
    hessian = damped(statistics.hessian, 0.1)
    pull = weight @ factored.hessian
    problem = Problem(weight, hessian, factored.inverse_factor, factored.dead, hessian.diagonal(), pull)
    plain = fit_planes(problem, settings.replace(sweeps=0), IN_TORCH)
    fit, code = _begin(plain, coded(settings)), find_code(coded(settings).code)
    before = float("inf") * torch.ones(24)
    for _ in range(2):
        _search_windows(fit, code, weight, hessian, first, search_bits)
        assert torch.equal(fit.signs[0], coded_values(code, fit.stored))
        difference = weight - fit.dequantize()
        error = ((difference @ hessian) * difference).sum(1)
        assert bool((error <= before * (1 + 1e-5)).all())
        before = error
    refit_columns(fit, pull, hessian)
    refit_rows(fit, pull, hessian)
    difference = weight - fit.dequantize()
    assert float(((difference @ hessian) * difference).sum()) < 1.01 * float(before.sum())  # scales are rounded


@pytest.mark.parametrize(("base", "least"), [(1, 0.995), (2, 0.98)])
def test_the_code_made_for_so_many_planes_loses_less_than_the_other(base, least, statistics_of):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1500, 256, generator=generator)
    inputs += inputs @ torch.randn(256, 256, generator=generator) * 0.02
    weight, statistics = weight_of(64, 256), statistics_of(text=inputs)
    settings = PLAIN.replace(base_planes=base, residual_planes=0)
    errors = {code: solve(weight, statistics, settings.replace(code=code)).error for code in CODES}
    own = errors.pop(code_for(base).name)
    assert own < least * min(errors.values())


def test_without_sweeps_one_search_and_no_refit_of_columns(correlated_inputs, statistics_of):
    weight, statistics = weight_of(32, 160), statistics_of(text=correlated_inputs(900, 160))
    quick = solve(weight, statistics, coded(PLAIN).replace(sweeps=0))
    plain = solve(weight, statistics, PLAIN.replace(sweeps=0, iterations=4))
    assert torch.equal(quick.planes.column_scale, plain.planes.column_scale)
    assert torch.equal(quick.planes.residual_index, plain.planes.residual_index)
    assert solve(weight, statistics, coded(PLAIN)).error < quick.error < plain.error


@pytest.mark.parametrize("width", [1, 3, 33, 130])
def test_zeros_and_odd_widths(width, correlated_inputs, statistics_of):
    weight, statistics = weight_of(5, width), statistics_of(text=correlated_inputs(4 * width + 8, width))
    weight[2] = 0.0
    found = solve(weight, statistics, coded(PLAIN.replace(residual_planes=0, sweeps=1))).planes.dequantize()
    assert bool(found.isfinite().all())
    assert float(found[2].abs().max()) < 1e-3


def test_nothing_but_zeros():
    no_data = InputStatistics.without_data(130, torch.device("cpu"))
    found = solve(torch.zeros(3, 130), no_data, coded(PLAIN)).planes.dequantize()
    assert torch.equal(found, torch.zeros(3, 130))


def test_inputs_that_are_always_zero_have_no_weight(correlated_inputs, statistics_of):
    inputs = correlated_inputs(300, 140)
    inputs[:, 5] = 0.0
    inputs[:, 128:] = 0.0  # a whole block
    found = solve(weight_of(6, 140), statistics_of(text=inputs), coded(PLAIN)).planes.dequantize()
    assert torch.equal(found[:, 5], torch.zeros(6))
    assert torch.equal(found[:, 128:], torch.zeros(6, 12))


def test_map_of_modalities_acts_on_coded_planes(correlated_inputs, statistics_of):
    statistics = statistics_of(text=correlated_inputs(300, 140), image=3 * correlated_inputs(300, 140, 1))
    settings = coded(PLAIN.replace(significance="modality"))
    found = solve(weight_of(16, 140), statistics, settings)
    assert found.significance is not None
    other = solve(weight_of(16, 140), statistics, settings.replace(significance="uniform"))
    assert not torch.equal(found.planes.dequantize(), other.planes.dequantize())
    assert found.error < 1.1 * other.error


def test_of_large_and_small_weights_all_scales_are(correlated_inputs, statistics_of):
    weight, statistics = weight_of(16, 140), statistics_of(text=correlated_inputs(300, 140))
    plain = solve(weight, statistics, coded(PLAIN)).planes.dequantize()
    for power in (-40, 40):
        found = solve(weight * 2.0**power, statistics, coded(PLAIN)).planes.dequantize()
        assert torch.equal(found, plain * 2.0**power)
