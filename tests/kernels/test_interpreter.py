"""The interpreter that the tests use computes what Triton's does."""

import os

import pytest
import torch

from optimum_sab.core.settings import LayerSettings
from optimum_sab.ops.shape import LayerShape
from optimum_sab.ops.verification import sample_weight
from tests.speed.interpreter import quicken, restore

sab_kernels = pytest.importorskip("sab_kernels", exc_type=ImportError)
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are not interpreted")
ROWS, COLUMNS = 40, 140


def computed(settings, tokens, dtype):
    """Outputs of two layers with one input, and the dense weight."""
    packed = sample_weight(settings, ROWS, COLUMNS)
    geometry = LayerShape.of(ROWS, COLUMNS, settings).geometry
    tensors = sab_kernels.to_kernel_layout(packed.tensors, geometry)
    inputs = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.arange(ROWS, dtype=torch.float32)
    outputs = sab_kernels.binary_linear(inputs, tensors, geometry, bias)
    return [outputs, sab_kernels.dequantize(tensors, geometry, torch.float32)]


@pytest.mark.parametrize("tokens", [1, 12])  # a few and more take different kernels
@pytest.mark.parametrize(
    ("settings", "dtype"), [(LayerSettings(), torch.float32), (LayerSettings(row_scale="fp16"), torch.float16)]
)
def test_quick_interpreter_computes_the_same_bits(settings, tokens, dtype):
    quicken()
    quick = computed(settings, tokens, dtype)
    restore()
    try:
        as_it_comes = computed(settings, tokens, dtype)
    finally:
        quicken()
    assert all(torch.equal(a, b) for a, b in zip(quick, as_it_comes, strict=True))
