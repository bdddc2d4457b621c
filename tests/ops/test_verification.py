"""The comparison that decides whether the Triton kernels may be used: it must see what is wrong."""

import pytest
import torch

from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.ops.shape import LayerShape
from optimum_sab.ops.verification import (
    CODED,
    COLUMNS,
    PAIRS,
    ROWS,
    TOKENS,
    TOLERANCE,
    disagreement,
    sample_weight,
)

sab_kernels = pytest.importorskip("sab_kernels", exc_type=ImportError)
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")


def taps(settings):
    return LayerShape.of(ROWS, COLUMNS, settings).geometry.code


@pytest.fixture
def kernel(monkeypatch):
    """``kernel(change)``: a right "kernel", quick on a CPU, whose output [tokens, rows] goes through ``change``,
    which is told the layer's settings."""

    def install(change):
        calls = []

        def binary_linear(x, tensors, geometry):
            calls.append(x.shape[0])
            stored = sab_kernels.from_kernel_layout(tensors, geometry)
            settings = next(each for each in (LayerSettings(), *CODED) if taps(each) == geometry.code)
            dense = PackedWeight(stored, geometry.rows, geometry.columns, settings).dequantize()
            out = (x.float() @ dense.T).to(x.dtype)
            return change(out, settings)

        monkeypatch.setattr(sab_kernels, "binary_linear", binary_linear)
        return calls

    return install


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_disagreement_is_none_for_the_kernels(dtype):
    assert disagreement(CPU, dtype) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_disagreement_is_none_on_the_gpu(dtype):
    assert disagreement(torch.device("cuda"), dtype) is None


def test_disagreement_looks_at_every_number_of_tokens(kernel):
    calls = kernel(lambda out, settings: out)
    assert disagreement(CPU, torch.float16) is None
    assert tuple(calls) == sum(CODED.values(), TOKENS)


@interpreted
def test_disagreement_of_kernels_one_percent_off_names_error_and_tokens(monkeypatch):
    right = sab_kernels.binary_linear
    monkeypatch.setattr(sab_kernels, "binary_linear", lambda *arguments: right(*arguments) * 1.01)
    problem = disagreement(CPU, torch.float16)
    assert "are wrong" in problem and "with 1 tokens" in problem, problem
    assert float(problem.partition("relative error ")[2].split()[0]) == pytest.approx(0.01, abs=0.002)


@pytest.mark.parametrize("tokens", TOKENS)
def test_disagreement_at_one_number_of_tokens_is_seen(kernel, tokens):
    kernel(lambda out, settings: out * 1.01 if len(out) == tokens and settings == LayerSettings() else out)
    assert f"with {tokens} tokens" in disagreement(CPU, torch.float16)


@pytest.mark.parametrize(("coded", "tokens"), [(each, tokens) for each, counts in CODED.items() for tokens in counts])
def test_disagreement_on_a_coded_layer_is_seen(kernel, coded, tokens):
    kernel(lambda out, settings: out * 1.01 if len(out) == tokens and settings == coded else out)
    assert f"with {tokens} tokens" in disagreement(CPU, torch.float16)


@pytest.mark.parametrize("pairs", PAIRS)
def test_disagreement_on_experts_is_seen(kernel, monkeypatch, pairs):
    kernel(lambda out, settings: out)
    right = sab_kernels.experts_linear

    def one_percent_off(rows, experts, *arguments):
        found = right(rows, experts, *arguments)
        return found * 1.01 if len(experts) == pairs else found

    monkeypatch.setattr(sab_kernels, "experts_linear", one_percent_off)
    assert f"with {pairs} pairs" in disagreement(CPU, torch.float16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_disagreement_of_one_bad_element_is_seen(kernel, value):
    def spoil(out, settings):
        out[-1, -1] = value
        return out

    kernel(spoil)
    assert "are wrong" in disagreement(CPU, torch.float16)


def test_disagreement_of_a_row_that_is_missing_is_seen(kernel):
    kernel(lambda out, settings: torch.nn.functional.pad(out[:, :-1], (0, 1)))
    assert "are wrong" in disagreement(CPU, torch.float16)


def test_disagreement_reports_what_was_raised_in_one_line(kernel):
    def fail(out, settings):
        raise RuntimeError("ptxas: out of registers\nand a page of more")

    kernel(fail)
    problem = disagreement(CPU, torch.float16)
    assert "do not run" in problem and "RuntimeError: ptxas: out of registers" in problem
    assert "\n" not in problem and "a page of more" not in problem


def test_disagreement_of_a_layout_that_cannot_be_made_does_not_raise(monkeypatch):
    def fail(tensors, geometry):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(sab_kernels, "to_kernel_layout", fail)
    assert "do not run" in disagreement(CPU, torch.float16)


def test_disagreement_leaves_the_global_generator_alone(kernel):
    kernel(lambda out: out)
    before = torch.get_rng_state()
    disagreement(CPU, torch.float16)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "settings",
    [
        LayerSettings(),
        LayerSettings(block_size=32, base_planes=2, row_scale="fp16"),
        LayerSettings(residual_planes=0),
        LayerSettings(block_size=512, base_planes=2, residual_planes=2, salient_fraction=0.3),
    ],
)
@pytest.mark.parametrize(("out_features", "in_features"), [(ROWS, COLUMNS), (1, 1), (5, 77), (32, 128), (40, 131)])
def test_sample_weight_is_a_valid_layer_and_always_the_same(settings, out_features, in_features):
    packed = sample_weight(settings, out_features, in_features)
    packed.validate()
    dense = packed.dequantize()
    assert dense.shape == (out_features, in_features)
    assert bool(dense.abs().gt(0).any(1).all())
    assert torch.equal(dense, sample_weight(settings, out_features, in_features).dequantize())
    again = PackedWeight.pack(packed.unpack(), settings)
    for name in {"weight", "residual_sign", "residual_index", "col_scale"} & set(packed.tensors):  # no stray bits
        assert torch.equal(again.tensors[name], packed.tensors[name])
