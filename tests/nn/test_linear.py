import copy
import pickle

import pytest
import torch
from torch import nn

from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import solve
from optimum_sab.format.layout import tensor_specs
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.nn.linear import SABLinear

OUT, WIDTH = 6, 75
SMALL = LayerSettings(block_size=32)
SETTINGS = [SMALL, SMALL.replace(residual_planes=0), SMALL.replace(base_planes=2, row_scale="fp16")]


def packed_weight(settings=SMALL):
    weight = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(0))
    hessian = torch.eye(WIDTH)
    statistics = InputStatistics(hessian, {"text": hessian}, None, {"text": WIDTH})
    return PackedWeight.pack(solve(weight, statistics, settings).planes, settings)


def random_bias(dtype=torch.float32):
    return torch.randn(OUT, generator=torch.Generator().manual_seed(2)).to(dtype)


def random_inputs(dtype=torch.float32):
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def bits_of(layer):
    """The stored tensors, bias aside, as they would be written."""
    return {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "bias"}


def assert_same_bits(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert not tensor.dtype.is_floating_point
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_holds_the_format_s_tensors_and_the_bias(settings, bias):
    layer = SABLinear(WIDTH, OUT, settings, bias=bias)
    expected = {*tensor_specs(OUT, WIDTH, settings), *(["bias"] if bias else [])}
    assert set(layer.state_dict()) == expected
    assert set(SABLinear.from_packed(packed_weight(settings), random_bias() if bias else None).state_dict()) == expected


@pytest.mark.parametrize("settings", SETTINGS)
def test_load_state_dict_fills_a_skeleton_exactly(settings):
    layer = SABLinear.from_packed(packed_weight(settings), random_bias())
    empty = SABLinear(WIDTH, OUT, settings)
    assert not empty.packed.dequantize().any()
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(random_inputs()), layer(random_inputs()))


def test_load_state_dict_refuses_a_dense_weight():
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        SABLinear(WIDTH, OUT, SMALL, bias=False).load_state_dict(nn.Linear(WIDTH, OUT, bias=False).state_dict(), False)


def test_skeleton_on_meta_holds_no_memory():
    layer = SABLinear(WIDTH, OUT, SMALL, device="meta", dtype=torch.bfloat16)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    assert layer.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_equals_the_dense_layer(dtype):
    layer = SABLinear.from_packed(packed_weight(), random_bias())
    dense = nn.Linear(WIDTH, OUT)
    dense.weight.data, dense.bias.data = packed_weight().dequantize(), random_bias()
    inputs = random_inputs(dtype)
    found = layer(inputs)
    assert found.dtype == dtype
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(found.float(), dense(inputs.float()), rtol=rtol, atol=rtol * 10)


def test_from_packed_shares_the_storage():
    packed, bias = packed_weight(), random_bias()
    layer = SABLinear.from_packed(packed, bias)
    for name, tensor in packed.tensors.items():
        assert getattr(layer, name).data_ptr() == tensor.data_ptr()
        assert layer.packed.tensors[name].data_ptr() == tensor.data_ptr()
    assert layer.bias.data_ptr() == bias.data_ptr()


def test_nothing_from_packed_asks_for_a_gradient():
    layer = SABLinear.from_packed(packed_weight(), nn.Parameter(random_bias()))
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    inputs = random_inputs().requires_grad_()
    layer(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad[0, 0], packed_weight().dequantize().sum(0))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: nn.Sequential(m).to(torch.float16)[0],
    ],
)
def test_casting_changes_the_bias_and_no_stored_bit(settings, cast):
    layer = SABLinear.from_packed(packed_weight(settings), random_bias())
    before = bits_of(layer)
    layer = cast(layer)
    assert layer.bias.dtype != torch.float32
    assert_same_bits(bits_of(layer), before)
    assert torch.equal(layer.packed.dequantize(), packed_weight(settings).dequantize())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_independent(duplicate):
    layer = SABLinear.from_packed(packed_weight(), random_bias())
    other = duplicate(layer)
    before = bits_of(layer)
    assert_same_bits(bits_of(other), before)
    assert other.settings == layer.settings
    assert torch.equal(other(random_inputs()), layer(random_inputs()))
    other.weight.data.zero_()
    other.col_scale.data.zero_()
    assert_same_bits(bits_of(layer), before)


def test_dequantize_gives_the_dense_layer_of_the_packed_weight():
    layer = SABLinear.from_packed(packed_weight(), random_bias())
    dense = layer.dequantize()
    assert type(dense) is nn.Linear
    assert (dense.in_features, dense.out_features) == (WIDTH, OUT)
    assert dense.weight.dtype == torch.float32
    assert torch.equal(dense.weight, packed_weight().dequantize())
    assert torch.equal(dense.bias, random_bias())
    torch.testing.assert_close(dense(random_inputs()), layer(random_inputs()))


def test_dequantize_casts_to_the_asked_dtype_and_keeps_the_absence_of_a_bias():
    dense = SABLinear.from_packed(packed_weight()).dequantize(torch.bfloat16)
    assert dense.bias is None
    assert torch.equal(dense.weight, packed_weight().dequantize().bfloat16())
    assert SABLinear.from_packed(packed_weight(), random_bias()).dequantize(torch.float16).bias.dtype == torch.float16


def test_bits_per_weight_counts_the_bias():
    packed = packed_weight()
    assert SABLinear.from_packed(packed).bits_per_weight == packed.bits_per_weight
    for dtype, size in ((torch.float32, 32), (torch.bfloat16, 16)):
        layer = SABLinear.from_packed(packed, random_bias(dtype))
        assert layer.bits_per_weight == pytest.approx(packed.bits_per_weight + size * OUT / (OUT * WIDTH))


def test_repr_shows_shape_bias_planes_block_and_scale():
    shown = repr(SABLinear.from_packed(packed_weight(SMALL.replace(base_planes=2)), random_bias()))
    for part in (f"in_features={WIDTH}", f"out_features={OUT}", "bias=True", "planes=2+1", "block_size=32", "fp8"):
        assert part in shown
    assert "bias=False" in repr(SABLinear.from_packed(packed_weight()))
