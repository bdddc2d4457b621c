import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import solve
from optimum_sab.errors import ConfigError
from optimum_sab.format.layout import tensor_specs
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.nn.linear import SABLinear
from optimum_sab.ops import force_backend

OUT, WIDTH = 6, 75
SMALL = LayerSettings(block_size=32)
SETTINGS = [SMALL, SMALL.replace(residual_planes=0), SMALL.replace(base_planes=2, row_scale="fp16")]


@functools.cache
def solved_planes(settings):
    weight = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(0))
    hessian = torch.eye(WIDTH)
    statistics = InputStatistics(hessian, {"text": hessian}, None, {"text": WIDTH})
    return solve(weight, statistics, settings).planes


def packed_weight(settings=SMALL):
    return PackedWeight.pack(solved_planes(settings), settings)  # new tensors at every call


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


# -- layouts -----------------------------------------------------------------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton():
    """Triton computes, interpreted where there is no GPU."""
    pytest.importorskip("triton")
    with force_backend("triton"):
        yield


def kernel_layer(settings=SMALL, bias=True):
    layer = SABLinear.from_packed(packed_weight(settings), random_bias() if bias else None).to(DEVICE).prepare()
    assert layer.layout == "kernel"
    return layer


def assert_computes(layer, settings=SMALL, dtype=torch.float32, bias=True):
    inputs = random_inputs(dtype).to(DEVICE)
    dense = nn.functional.linear(inputs.cpu().double(), packed_weight(settings).dequantize().double())
    expected = dense + random_bias().double() if bias else dense
    found = layer(inputs)
    assert found.dtype == dtype
    rtol = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(found.detach().cpu().double(), expected, rtol=rtol, atol=rtol * 10)


def assert_stored_bits(layer, settings=SMALL):
    assert_same_bits({n: t.cpu() for n, t in bits_of(layer).items()}, packed_weight(settings).tensors)


@pytest.mark.parametrize("settings", SETTINGS)
def test_to_layout_and_back_is_exact(triton, settings):
    layer = SABLinear.from_packed(packed_weight(settings), random_bias())
    assert layer.to_layout("stored").layout == "stored"
    assert layer.to_layout("kernel") is layer
    assert layer.layout == "kernel"
    assert any(t.shape != packed_weight(settings).tensors[n].shape for n, t in zip(layer.shape.names, layer.tensors))
    assert layer.to_layout("kernel").layout == "kernel"
    layer.to_layout("stored")
    assert_same_bits(dict(zip(layer.shape.names, layer.tensors)), packed_weight(settings).tensors)


def test_to_layout_keeps_the_parameters_names_and_their_lack_of_gradients(triton):
    layer = SABLinear.from_packed(packed_weight(), random_bias())
    names = [name for name, _ in layer.named_parameters()]
    layer.to_layout("kernel")
    assert [name for name, _ in layer.named_parameters()] == names
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("bias", [True, False])
def test_kernel_layout_computes_the_same(triton, settings, bias):
    assert_computes(kernel_layer(settings, bias), settings, bias=bias)


@pytest.mark.parametrize("settings", SETTINGS)
def test_kernel_layout_has_the_stored_tensors_in_state_dict_packed_and_dequantize(triton, settings):
    layer = kernel_layer(settings)
    assert_stored_bits(layer, settings)
    layer.packed.validate()
    assert_same_bits({n: t.cpu() for n, t in layer.packed.tensors.items()}, packed_weight(settings).tensors)
    assert torch.equal(layer.dequantize().weight.cpu(), packed_weight(settings).dequantize())
    assert layer.layout == "kernel"  # looking changes nothing
    holder = nn.ModuleDict({"a": layer})
    assert set(holder.state_dict()) == {f"a.{name}" for name in layer.state_dict()}
    assert torch.equal(holder.state_dict()["a.weight"].cpu(), packed_weight(settings).tensors["weight"])


def test_kernel_layout_has_the_bits_per_weight_of_the_stored_tensors(triton):
    layer = SABLinear.from_packed(packed_weight(), random_bias())
    before = layer.bits_per_weight
    assert layer.to_layout("kernel").bits_per_weight == before
    assert sum(t.nbytes for t in layer.tensors) > layer.packed.stored_bytes  # the padding of so small a layer


@pytest.mark.parametrize("source", ["stored", "kernel"])
def test_load_state_dict_into_the_kernel_layout(triton, source):
    other = SABLinear.from_packed(packed_weight(), random_bias())
    if source == "kernel":
        other.to_layout("kernel")
    layer = SABLinear(WIDTH, OUT, SMALL, device=DEVICE).prepare()
    assert layer.layout == "kernel"
    layer.load_state_dict(other.state_dict())
    assert layer.layout == "kernel"
    assert_stored_bits(layer)
    assert_computes(layer)


def test_load_state_dict_with_assign_into_the_kernel_layout(triton):
    state = {name: tensor.to(DEVICE) for name, tensor in packed_weight().tensors.items()}
    layer = SABLinear(WIDTH, OUT, SMALL, device=DEVICE).prepare()
    layer.load_state_dict({**state, "bias": random_bias().to(DEVICE)}, assign=True)
    assert_computes(layer)
    assert_stored_bits(layer)


def test_load_state_dict_of_a_wrong_shape_leaves_the_kernel_layout_working(triton):
    layer = kernel_layer()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict({**layer.state_dict(), "weight": torch.zeros(1, 1, 1, dtype=torch.int32)})
    assert_computes(layer)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_of_the_kernel_layout_are_equal_and_independent(triton, duplicate):
    layer = kernel_layer()
    layer.backend = "triton"
    other = duplicate(layer)
    assert (other.layout, other.backend) == ("kernel", "triton")
    assert_computes(other)
    layer.weight.data.zero_()
    layer.col_scale.data.zero_()
    assert_stored_bits(other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("settings", SETTINGS)
def test_casting_in_the_kernel_layout_changes_the_bias_and_no_stored_bit(triton, settings, dtype):
    layer = kernel_layer(settings).to(dtype)
    assert (layer.layout, layer.bias.dtype) == ("kernel", dtype)
    assert_stored_bits(layer, settings)
    assert_computes(layer, settings, dtype)


def test_moving_to_meta_leaves_the_stored_shapes(triton):
    layer = kernel_layer().to("meta")
    assert layer.layout == "stored"
    assert {t.device.type for t in layer.parameters()} == {"meta"}
    assert tuple(layer.weight.shape) == tensor_specs(OUT, WIDTH, SMALL)["weight"].shape


def test_to_empty_reads_nothing_from_memory_that_holds_nothing(triton, monkeypatch):
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(-1 if a[0].is_signed() else 255))
    layer = SABLinear(WIDTH, OUT, SMALL, device="meta").to_empty(device=DEVICE)
    monkeypatch.undo()
    layer.load_state_dict({**packed_weight().tensors, "bias": random_bias()})
    assert_computes(layer.prepare())
    assert_stored_bits(layer)


def test_casting_where_triton_computes_no_more_goes_back_to_the_stored_layout():
    pytest.importorskip("triton")
    with force_backend("triton"):
        layer = kernel_layer()
    layer.backend = "reference"
    layer.half()
    assert layer.layout == "stored"
    assert_stored_bits(layer)
    assert_computes(layer, dtype=torch.float16)


def test_gradients_pass_through_the_kernel_layout(triton):
    layer = kernel_layer()
    layer.bias.requires_grad_()
    inputs = random_inputs().to(DEVICE).requires_grad_()
    layer(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad[0, 0].cpu(), packed_weight().dequantize().sum(0))
    torch.testing.assert_close(layer.bias.grad.cpu(), torch.full((OUT,), 6.0))


# -- prepare -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "layout"), [("triton", "kernel"), ("reference", "stored")])
def test_prepare_follows_the_backend_of_the_layer(backend, layout):
    if backend == "triton":
        pytest.importorskip("triton")
    layer = SABLinear.from_packed(packed_weight(), random_bias()).to(DEVICE)
    layer.backend = backend
    with force_backend("reference" if backend == "triton" else None):  # the layer's own choice comes first
        assert layer.prepare() is layer
        assert layer.layout == layout
    assert_computes(layer)


def test_prepare_undoes_the_kernel_layout_where_it_is_not_read_any_more(triton):
    layer = kernel_layer()
    layer.backend = "reference"
    assert layer.prepare().layout == "stored"
    assert_stored_bits(layer)


def test_backend_of_a_layer_wins_over_the_forced_one(monkeypatch):
    from optimum_sab.ops import operator

    used, decide = [], operator.backend_name
    monkeypatch.setattr(operator, "backend_name", lambda *a: used.append(decide(*a)) or used[-1])
    layer = SABLinear.from_packed(packed_weight(), random_bias())
    assert layer.backend is None
    layer.backend = "reference"
    with force_backend("triton"):
        layer(random_inputs())
    assert used == ["reference"]


def test_backend_that_is_unknown_is_refused_by_forward_and_prepare():
    layer = SABLinear.from_packed(packed_weight(), random_bias())
    layer.backend = "gpu"
    for call in (layer.prepare, lambda: layer(random_inputs())):
        with pytest.raises(ConfigError, match="'gpu' is no backend"):
            call()


def test_prepare_leaves_a_skeleton_on_meta_alone(triton):
    layer = SABLinear(WIDTH, OUT, SMALL, device="meta").prepare()
    assert layer.layout == "stored"
    assert tuple(layer.weight.shape) == tensor_specs(OUT, WIDTH, SMALL)["weight"].shape


class Hook:
    """What `prepare` may know of accelerate's hooks."""

    def __init__(self, offload=False, hooks=None):
        self.offload = offload
        if hooks is not None:
            self.hooks = hooks


@pytest.mark.parametrize(
    ("hook", "layout"),
    [
        (Hook(offload=True), "stored"),
        (Hook(hooks=[Hook(), Hook(offload=True)]), "stored"),
        (Hook(hooks=[Hook(), Hook()]), "kernel"),
        (Hook(), "kernel"),
        (object(), "kernel"),
    ],
    ids=["offload", "offload in a sequence", "sequence", "hook", "without attributes"],
)
def test_prepare_leaves_offloaded_layers_alone(triton, hook, layout):
    with force_backend("reference"):
        layer = SABLinear.from_packed(packed_weight(), random_bias()).to(DEVICE)
    layer._hf_hook = hook
    assert layer.layout == "stored"
    assert layer.prepare().layout == layout
    assert_computes(layer)


def test_forward_refuses_a_layer_on_meta():
    layer = SABLinear(WIDTH, OUT, SMALL, device="meta")
    with pytest.raises(ConfigError, match="on meta: it was never loaded"):
        layer(random_inputs())
