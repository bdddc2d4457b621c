"""Quantizing on an accelerator and computing there, on a simulated one that refuses operands of two devices."""

import os

import pytest
import torch
import transformers
from packaging.version import Version

from optimum_sab.core.settings import LayerSettings
from tests.accelerator import work
from tests.calibration.ranked import Server

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.skipif(
        not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this PyTorch has no devices in Python",
    ),
]
new = pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="not on this line")
full = pytest.mark.full


@pytest.fixture(scope="module")
def server(warm):
    found = Server(warm / "python")
    yield found
    found.close()


def value(server, function, *arguments):
    [found] = server.run(1, function, *arguments, environment={"TRITON_INTERPRET": "1"})
    if found.error is not None:
        raise found.error
    assert found.code == 0
    return found.value


def test_operands_on_two_devices_are_refused(server):
    two, also, view = value(server, work.mixing)
    assert "same device" in two and "same device" in also and "numpy" in view


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2_5_vl", "default"),
        pytest.param("qwen2_5_vl", "paper", marks=full),
        pytest.param("llama", "paper", marks=full),
        pytest.param("gemma3", "default", marks=full),
        pytest.param("llava", "default", marks=full),
        pytest.param("qwen3_vl", "default", marks=full),
    ],
)
def test_a_model_quantized_block_by_block_on_an_accelerator_is_the_cpu_s(server, family, settings):
    (cpu, _), (there, report) = value(server, work.family, family, settings)
    same_but_for_rounding(cpu, there)
    assert report.temperature is not None


@pytest.mark.parametrize("settings", ["partly coded", pytest.param("coded", marks=full)])
def test_coded_planes_and_refinement_go_there_too(server, settings):
    (_, cpu), (_, there) = value(server, work.family, "llama", settings, True)
    for mine, own in zip(there.blocks, cpu.blocks, strict=True):
        assert mine.error == pytest.approx(own.error, rel=0.05)
        assert mine.reconstruction.after == pytest.approx(own.reconstruction.after, rel=0.15)
    assert there.tuning.after == pytest.approx(cpu.tuning.after, rel=0.15)


@new
def test_experts_are_solved_there(server):
    (cpu, _), (there, _) = value(server, work.mixture)
    same_but_for_rounding(cpu, there)


@full
@new
@pytest.mark.parametrize("settings", [{}, {"stream_weights": True}], ids=["held", "streamed"])
def test_from_pretrained_works_there(server, small_example, settings):
    (cpu, _), (there, _) = value(server, work.loaded_with, str(small_example), settings)
    assert cpu.keys() == there.keys()


@pytest.mark.parametrize(
    "settings",
    [
        LayerSettings(),
        pytest.param(LayerSettings(base_planes=2, salient_fraction=0.125), marks=full),
        pytest.param(LayerSettings(code="trellis16"), marks=full),
    ],
    ids=["default", "two-bit", "coded"],
)
def test_interpreted_kernels_take_tensors_of_an_accelerator(server, settings):
    output, gradient, weight = value(server, work.kernels, settings)
    assert output < 1e-5 and gradient < 1e-5 and weight == 0


def test_a_packed_model_moved_there_generates_and_is_saved(server, smallest_example):
    (here, there), saved = value(server, work.packed_model, str(smallest_example))
    assert here == there and saved


def same_but_for_rounding(cpu, there):
    """Operators that autograd or a model takes apart in another way on another device round in another way."""
    assert cpu.keys() == there.keys()
    equal = sum(bool((cpu[name] == there[name]).all()) for name in cpu)
    assert equal >= 0.7 * len(cpu)
