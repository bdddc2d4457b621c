import pytest
import torch

from optimum_sab.core.hessian import InputStatistics, damped
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import output_error, solve
from optimum_sab.errors import ConfigError
from optimum_sab.eval.coded.fit import descend, refit_columns, refit_rows
from optimum_sab.eval.coded.solver import Coding, begin, solve_coded
from optimum_sab.format.layout import stored_bits_per_weight
from optimum_sab.format.packed_weight import PackedWeight

PLAIN = LayerSettings(block_size=64, sweeps=0)


def statistics_of(width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    hessian = inputs.T @ inputs
    hessian /= hessian.diagonal().mean()
    return InputStatistics(hessian, {"text": hessian}, None, {"text": inputs.shape[0]})


def weight_of(rows, width):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", [PLAIN, PLAIN.replace(residual_planes=0), PLAIN.replace(base_planes=2)])
def test_coded_planes_are_better_than_plain_ones_with_descent(settings):
    weight, statistics = weight_of(96, 160), statistics_of(160)
    coded = solve_coded(weight, statistics, settings, Coding(rounds=1, descents=3))
    plain = solve(weight, statistics, settings.replace(sweeps=2))
    assert coded.error < 0.93 * plain.error
    packed = PackedWeight.pack(coded.planes, Coding().expanded(settings))  # scales are rounded as they are stored
    assert output_error(weight, packed.dequantize(), statistics.hessian) == pytest.approx(coded.error, rel=1e-4)


@pytest.mark.parametrize("settings", [PLAIN, PLAIN.replace(base_planes=2, residual_planes=0)])
@pytest.mark.parametrize("first", [0, 13])
def test_descent_never_raises_the_error_of_a_row(settings, first):
    width = 150
    weight, statistics, coding = weight_of(24, width), statistics_of(width), Coding()
    hessian = damped(statistics.hessian, 0.1)
    plain = solve(weight, statistics, settings)
    fit = begin(plain.planes, coding.expanded(settings), coding.found)
    before = float("inf") * torch.ones(24)
    for _ in range(3):
        descend(fit, weight, hessian, 32, first)
        difference = weight - fit.dense()
        error = ((difference @ hessian) * difference).sum(1)
        assert bool((error <= before * (1 + 1e-5)).all())
        before = error
    refit_columns(fit, weight, hessian)
    refit_rows(fit, weight, hessian)
    difference = weight - fit.dense()
    assert float(((difference @ hessian) * difference).sum()) < 1.01 * float(before.sum())  # scales are rounded


def test_bits_are_those_of_stored_planes_and_row_scales():
    coding, settings = Coding(tied=False), LayerSettings()
    assert Coding().bits_per_weight(512, 1024, settings) == stored_bits_per_weight(512, 1024, settings)
    more = coding.bits_per_weight(512, 1024, settings) - stored_bits_per_weight(512, 1024, settings)
    assert more == pytest.approx(8 / 512)  # a row scale of eight bits for each row and block of 512
    narrow = coding.bits_per_weight(8, 33, PLAIN) - stored_bits_per_weight(8, 33, PLAIN)
    assert narrow == pytest.approx(8 / 33)  # the plane's 64 bits are not counted twice


def test_where_planes_would_be_too_many_they_are_plain():
    settings = PLAIN.replace(base_planes=3)
    weight, statistics = weight_of(8, 64), statistics_of(64)
    assert Coding().expanded(settings) is None
    assert torch.equal(
        solve_coded(weight, statistics, settings, Coding()).planes.dequantize(),
        solve(weight, statistics, settings).planes.dequantize(),
    )
    assert Coding().bits_per_weight(8, 64, settings) == stored_bits_per_weight(8, 64, settings)


@pytest.mark.parametrize("width", [1, 3, 33, 130])
def test_zeros_and_odd_widths(width):
    settings = PLAIN.replace(residual_planes=0)
    weight, statistics = weight_of(5, width), statistics_of(width)
    weight[2] = 0.0
    found = solve_coded(weight, statistics, settings, Coding(rounds=1, descents=1)).planes.dequantize()
    assert bool(found.isfinite().all())
    assert float(found[2].abs().max()) < 1e-3


def test_inputs_that_are_always_zero_have_no_weight():
    weight, statistics = weight_of(6, 64), statistics_of(64)
    statistics.hessian[5] = statistics.hessian[:, 5] = 0.0
    found = solve_coded(weight, statistics, PLAIN, Coding(rounds=2, descents=1)).planes.dequantize()
    assert torch.equal(found[:, 5], torch.zeros(6))


@pytest.mark.parametrize("changes", [{"code": "magic"}, {"rounds": 0}, {"descents": -1}, {"window": 1.5}])
def test_bad_setting_is_named(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        Coding(**changes)
