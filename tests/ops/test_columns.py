"""Which loops over columns a device gets, and that those of Triton are looked at before they are used."""

import dataclasses

import pytest
import torch

from optimum_sab.core.columns import IN_TORCH
from optimum_sab.core.hessian import InputMoments
from optimum_sab.core.many import solve_many
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import solve
from optimum_sab.errors import SABWarning
from optimum_sab.ops import columns
from optimum_sab.ops.cpu.columns import loops_on_cpu

CPU, OTHER = torch.device("cpu"), torch.device("cuda", 5)


@pytest.fixture(autouse=True)
def forgotten():
    columns._on_accelerator.cache_clear()
    yield
    columns._on_accelerator.cache_clear()


def test_a_cpu_has_its_own():
    assert columns.column_loops(CPU) == loops_on_cpu()


def test_an_accelerator_has_triton_where_kernels_and_loops_agree(monkeypatch):
    asked = []
    monkeypatch.setattr(columns, "why_not", lambda name, device: asked.append((name, device)))
    monkeypatch.setattr(columns, "disagreement", lambda device: None)
    assert columns.column_loops(OTHER) is columns.IN_TRITON
    assert columns.IN_TRITON.search is IN_TORCH.search
    assert asked == [("triton", OTHER)]


@pytest.mark.parametrize("which", ["why_not", "disagreement"])
def test_torch_takes_their_place_with_one_warning_that_says_why(which, monkeypatch):
    monkeypatch.setattr(columns, "why_not", lambda name, device: None)
    monkeypatch.setattr(columns, "disagreement", lambda device: None)
    monkeypatch.setattr(columns, which, lambda *given: "there is no such thing")
    with pytest.warns(SABWarning, match=r"takes longer than it must.*torch on cuda: there is no such thing") as heard:
        found = [columns.column_loops(OTHER) for _ in range(2)]
    assert len(heard) == 1 and found == [IN_TORCH, IN_TORCH]


def test_a_device_that_triton_does_not_know_has_torch():
    with pytest.warns(SABWarning, match="Triton has no kernels for meta"):
        assert columns.column_loops(torch.device("meta")) is IN_TORCH


def test_the_loops_agree_with_torch_s_under_the_interpreter():
    pytest.importorskip("triton")
    assert columns.disagreement(CPU) is None


@pytest.mark.parametrize(("function", "named"), [("feed_back", "feedback"), ("descend", "descent")])
def test_loops_that_give_something_else_are_told(function, named, monkeypatch):
    pytest.importorskip("triton")
    from sab_kernels import columns as kernels

    right = getattr(kernels, function)
    monkeypatch.setattr(kernels, function, lambda *given: right(*given) * 1.5)
    assert f"leave another error there ({named}:" in str(columns.disagreement(CPU))


def test_loops_that_do_not_run_are_told(monkeypatch):
    pytest.importorskip("triton")
    from sab_kernels import columns as kernels

    def fails(*given):
        raise RuntimeError("no such device\nand more")

    monkeypatch.setattr(kernels, "feed_back", fails)
    assert columns.disagreement(CPU) == "the Triton loops do not run on it (RuntimeError: no such device)"


@pytest.mark.parametrize(
    "changes", [{}, {"base_planes": 2, "sweeps": 3}, {"salient_fraction": 0.0, "residual_planes": 0}]
)
def test_solve_leaves_the_same_error_with_either(changes):
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    moments = InputMoments(60, CPU, False, "the test's linear")
    moments.add("text", torch.randn(200, 60, generator=generator))
    weight, statistics = torch.randn(50, 60, generator=generator), moments.statistics()
    settings = dataclasses.replace(LayerSettings(block_size=32), **changes)
    expected = solve(weight, statistics, settings)
    found = solve(weight, statistics, settings, loops=columns.IN_TRITON)
    assert found.error == pytest.approx(expected.error, rel=1e-3)
    assert (found.planes.base_sign == expected.planes.base_sign).float().mean() > 0.999


@pytest.mark.parametrize("changes", [{}, {"base_planes": 2, "sweeps": 1}])
def test_a_stack_of_weights_is_solved_as_each_of_them(changes):
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    weights, statistics = torch.randn(3, 50, 60, generator=generator), []
    for number in range(3):
        moments = InputMoments(60, CPU, False, "the test's linear")
        moments.add("text", torch.randn(200, 60, generator=generator) * torch.logspace(0, -number, 60))
        statistics.append(moments.statistics())
    settings = dataclasses.replace(LayerSettings(block_size=32), **changes)
    found = solve_many(weights, statistics, settings, ["a", "b", "c"], columns.IN_TRITON, room=2**40)
    for weight, given, one in zip(weights, statistics, found, strict=True):
        expected = solve(weight, given, settings, loops=columns.IN_TRITON)
        assert one.error == pytest.approx(expected.error, rel=1e-3)
        assert (one.planes.base_sign == expected.planes.base_sign).float().mean() > 0.999
        assert torch.equal(one.planes.residual_index, expected.planes.residual_index)
