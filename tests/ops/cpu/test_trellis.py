"""The trellis search in C against the one in torch: the same paths but for rounding."""

import shutil

import pytest
import torch

from optimum_sab.core.code import TRELLIS16, Code
from optimum_sab.core.trellis import Ends, Levels, search_bits, whole_rows
from optimum_sab.errors import SABWarning
from optimum_sab.ops.cpu import compiler, trellis
from optimum_sab.ops.cpu.compiler import Build

CODES = [TRELLIS16, Code("3 planes", (17, 4, 6))]
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, compiler.COMPILERS)), reason="needs a C compiler")


@pytest.fixture(scope="module", params=[(), ("-mno-avx",)], ids=["native", "portable"])
def library(request):
    built = trellis.build_trellis(request.param)
    if built.library is None:
        pytest.skip(f"this compiler does not take {request.param}: {built.reason}")
    return built.library


def problem(rows, width, free, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, width, generator=generator)
    inputs = torch.randn(4 * width, width, generator=generator)
    hessian = inputs.T @ inputs / inputs.shape[0] + 0.1 * torch.eye(width)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True).float()
    scale = torch.rand(1 + free, 2, rows, generator=generator) + 0.2
    scale[-1, :, ::2] *= -1.0
    count = torch.arange(width) % (1 + free)
    levels = Levels(scale, torch.rand(width, generator=generator) + 0.5, torch.arange(width) * 2 // width, count)
    return target, factor, levels


@needs_compiler
@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
@pytest.mark.parametrize(("rows", "width", "free"), [(1, 1, 0), (3, 40, 1), (5, 200, 2), (2, 129, 3)])
def test_c_finds_the_paths_of_torch(library, code, rows, width, free):
    target, factor, levels = problem(rows, width, free)
    found = trellis.search_with(library, target, factor, levels, code, whole_rows(rows, code.memory, target.device))
    expected = search_bits(target, factor, levels, code)
    assert torch.equal(found, expected)


@needs_compiler
@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_c_keeps_fixed_ends(library, code):
    target, factor, levels = problem(4, 60, 1)
    generator = torch.Generator().manual_seed(1)
    ends = Ends(*(torch.rand(4, code.memory, generator=generator) > 0.5 for _ in range(2)))
    found = trellis.search_with(library, target, factor, levels, code, ends)
    assert torch.equal(found, search_bits(target, factor, levels, code, ends))
    assert torch.equal(found[:, -code.memory :] & 1, ends.after.to(torch.uint8))


@needs_compiler
def test_threads_change_nothing(library):
    target, factor, levels = problem(37, 150, 1)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ends = whole_rows(37, 4, target.device)
            found.append(trellis.search_with(library, target, factor, levels, TRELLIS16, ends))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def test_without_a_compiler_torch_searches_and_says_so(monkeypatch):
    target, factor, levels = problem(3, 40, 1)
    monkeypatch.setattr(trellis, "attempted", lambda build: Build(None, "there is none"))
    trellis._build.cache_clear()
    try:
        with pytest.warns(SABWarning, match="search runs in torch: there is none"):
            found = trellis.search_on_cpu(target, factor, levels, TRELLIS16)
    finally:
        trellis._build.cache_clear()
    assert torch.equal(found, search_bits(target, factor, levels, TRELLIS16))
