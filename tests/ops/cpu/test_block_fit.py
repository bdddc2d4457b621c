import pytest
import torch

from optimum_sab.core.alternating import fit_block, objective
from optimum_sab.core.settings import LayerSettings
from optimum_sab.ops.cpu.block_fit import build_block_fit, fit_on_cpu, fit_with
from optimum_sab.ops.cpu.compiler import find_compiler

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def library():
    return build_block_fit().library


@needs_compiler
@pytest.mark.parametrize("shape", [(37, 64), (70, 97), (128, 512)])
@pytest.mark.parametrize(("base", "residual"), [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (1, 3), (3, 1), (4, 0)])
def test_the_fit_in_c_is_that_of_torch_to_rounding(library, base, residual, shape):
    generator = torch.Generator().manual_seed(base + 4 * residual)
    weight = torch.randn(shape, generator=generator) * (torch.rand(shape[1], generator=generator) + 0.5)
    significance = torch.rand(1, shape[1], generator=generator).square()
    significance[:, 3] = 0
    settings = LayerSettings(block_size=512, base_planes=base, residual_planes=residual, iterations=5)
    salient = torch.zeros(shape[1], dtype=torch.bool)
    salient[torch.randperm(shape[1], generator=generator)[: settings.salient_columns(shape[1])]] = True
    expected = fit_block(weight, significance, salient, settings)
    found = fit_with(library, weight, significance, salient, settings)
    errors = [float(objective(weight, fit, significance)) for fit in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=2e-2, abs=1e-4)
    assert (found.sign == expected.sign).float().mean() > 0.98
    assert not found.sign[base:, :, ~salient].any()
    torch.testing.assert_close(found.column_scale.abs().mean(), torch.tensor(1.0))


@needs_compiler
@pytest.mark.parametrize("planes", [1, 2])
def test_zeros_and_equal_planes_stay_finite(library, planes):
    settings = LayerSettings(block_size=32, base_planes=planes)
    salient = torch.arange(32) % 4 == 0
    for weight in (torch.zeros(8, 32), torch.ones(8, 32), torch.full((8, 32), 1e-12)):
        found = fit_with(library, weight, torch.ones(1, 32), salient, settings)
        torch.testing.assert_close(found.dequantize(), weight, atol=2e-2, rtol=1e-2)


def test_error_weights_of_single_entries_are_fitted_in_torch():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    significance, salient = weight.square(), torch.arange(32) % 4 == 0
    found, expected = (
        fit(weight, significance, salient, LayerSettings(block_size=32)) for fit in (fit_on_cpu, fit_block)
    )
    assert torch.equal(found.sign, expected.sign)
