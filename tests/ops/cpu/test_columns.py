"""The solver's loops over columns in C against those in torch: the same bits."""

import shutil

import pytest
import torch

from optimum_sab.core.columns import IN_TORCH
from optimum_sab.core.descent import SweptBlock, descend_signs
from optimum_sab.core.factorization import factor_hessian
from optimum_sab.core.hessian import InputMoments
from optimum_sab.core.planes import BlockFit, WeightFit
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import solve
from optimum_sab.errors import SABWarning
from optimum_sab.ops.cpu import columns, compiler

PLANES = [(1, 0), (1, 1), (1, 3), (2, 0), (2, 1), (3, 1), (4, 0)]
SHAPES = [(32, 2), (32, 5), (96, 70), (160, 129), (64, 512)]  # rows and columns of a block
CPU = torch.device("cpu")

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, compiler.COMPILERS)), reason="needs a C compiler")


@pytest.fixture(scope="module", params=[(), ("-DSAB_PATH=1",), ("-DSAB_PATH=0",)], ids=["native", "AVX2", "portable"])
def library(request):
    return columns.build_columns(request.param).library


def problem(rows, width, planes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * width + 2, width, generator=generator)
    factored = factor_hessian(inputs.T @ inputs / width, 0.1)
    weight = torch.randn(rows, width, generator=generator)
    scale = torch.randn(sum(planes), 1, rows, generator=generator)  # of both signs, as after a refit
    column = torch.rand(width, generator=generator) + 0.5
    column[width // 2] = 0.0  # a dead column
    salient = (torch.arange(width) % 5 == 1) & torch.tensor(bool(planes[1]))
    return factored, weight, scale, column, salient


@needs_compiler
@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("shape", SHAPES)
def test_feedback_in_c_gives_the_bits_of_torch(library, shape, planes):
    factored, weight, scale, column, salient = problem(*shape, planes)
    fits = [BlockFit(scale[:, 0].clone(), column, torch.full((sum(planes), *shape), 7.0), salient) for _ in range(2)]
    U = factored.inverse_factor
    found = columns.feed_back(library, weight, fits[0], U, planes[0])
    expected = IN_TORCH.feedback(weight, fits[1], U, planes[0])
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()  # the product that follows rounds alike
    assert torch.equal(fits[0].sign, fits[1].sign)  # where a residual plane has no column the 7 stays


@needs_compiler
@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("shape", [(32, 33), (96, 70), (64, 200)])
def test_sweeps_in_c_give_the_bits_of_torch(library, shape, planes):
    factored, target, _, column, salient = problem(*shape, planes)
    settings = LayerSettings(block_size=64, base_planes=planes[0], residual_planes=planes[1])
    generator = torch.Generator().manual_seed(3)
    scale = torch.randn(sum(planes), -(-shape[1] // 64), shape[0], generator=generator)
    fits = []
    for sweep in (IN_TORCH.sweep, lambda block: columns.sweep(library, block)):
        signs = [torch.randn(shape, generator=generator.manual_seed(p)).sign() for p in range(sum(planes))]
        for sign in signs[planes[0] :]:
            sign[:, ~salient] = 0
        fits.append(WeightFit(signs, salient, scale, column, settings))
        for _ in range(2):
            descend_signs(fits[-1], target, factored.hessian, sweep)
    assert all(map(torch.equal, fits[0].signs, fits[1].signs))


@needs_compiler
def test_a_sweep_in_c_leaves_the_error_of_torch(library):
    factored, target, scale, column, salient = problem(64, 50, (2, 1))
    errors = []
    for sweep in (IN_TORCH.sweep, lambda block: columns.sweep(library, block)):
        fit = WeightFit([torch.ones(64, 50) for _ in range(3)], salient, scale, column, LayerSettings(block_size=64))
        value, error = target * 0.5, target * 0.5
        sweep(SweptBlock(fit, 0, error @ factored.hessian, value, error, factored.hessian))
        errors.append(error)
    assert torch.equal(*errors)
    assert not torch.equal(errors[0], target * 0.5)


@needs_compiler
@pytest.mark.parametrize("planes", [(1, 1), (2, 1)])
def test_what_is_not_finite_comes_out_not_finite(library, planes):
    factored, weight, scale, column, salient = problem(32, 30, planes)
    weight[3, 4] = torch.nan
    fit = BlockFit(scale[:, 0], column, torch.zeros(sum(planes), 32, 30), salient)
    errors = columns.feed_back(library, weight, fit, factored.inverse_factor, planes[0])
    assert errors[3, 4:].isnan().all()
    assert errors[[0, 1, 2, *range(4, 32)]].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("rows", [96, 90])
@pytest.mark.parametrize("settings", [LayerSettings(block_size=64), LayerSettings(block_size=64, base_planes=2)])
def test_solve_finds_the_same_with_either_and_with_any_number_of_threads(settings, rows):
    generator = torch.Generator().manual_seed(0)
    moments = InputMoments(160, CPU, False, "the test's linear")
    moments.add("text", torch.randn(400, 160, generator=generator))
    weight, statistics = torch.randn(rows, 160, generator=generator), moments.statistics()
    expected = solve(weight, statistics, settings).planes
    loops = columns.loops_on_cpu()
    assert not in_torch(loops)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found = solve(weight, statistics, settings, loops=loops).planes
            for name in ("base_sign", "residual_sign", "row_scale", "column_scale"):
                assert torch.equal(getattr(found, name), getattr(expected, name))
    finally:
        torch.set_num_threads(before)


def in_torch(loops):
    """Of coded planes a library of its own does the search."""
    return (loops.feedback, loops.sweep) == (IN_TORCH.feedback, IN_TORCH.sweep)


@pytest.fixture
def forgotten():
    columns._build.cache_clear()
    yield
    columns._build.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_without_a_compiler_torch_takes_its_place_with_one_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    with pytest.warns(SABWarning, match=r"takes longer than it must.*none.* is not a program") as heard:
        found = [columns.loops_on_cpu() for _ in range(2)]
    assert len(heard) == 1 and all(map(in_torch, found))


@needs_compiler
@pytest.mark.usefixtures("forgotten")
def test_a_library_that_rounds_otherwise_is_not_used(monkeypatch):
    monkeypatch.setattr(columns, "_agrees", lambda library: False)
    with pytest.warns(SABWarning, match="round otherwise than this build of torch"):
        assert in_torch(columns.loops_on_cpu())


@needs_compiler
def test_a_library_with_another_result_is_seen(monkeypatch):
    library = columns.build_columns().library
    wrong = columns.feed_back
    monkeypatch.setattr(columns, "feed_back", lambda *given: wrong(*given) * (1 + 2**-23))
    assert not columns._agrees(library)
