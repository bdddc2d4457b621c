"""The way past the dispatcher: the operator's numbers and errors, and the operator itself wherever somebody listens."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError, FormatError
from optimum_sab.nn.linear import SABLinear
from optimum_sab.ops import force_backend
from optimum_sab.ops.cpu import compiler, direct, kernel, layer

pytestmark = pytest.mark.skipif(not compiler.availability().usable, reason="needs a C compiler")
OUT, IN = 40, 140
OPERATOR = "optimum_sab::binary_linear"


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    monkeypatch.delenv("OPTIMUM_SAB_BACKEND", raising=False)


@pytest.fixture(params=["none", "trellis16"])
def linear(random_packed, request):
    return SABLinear.from_packed(
        random_packed(OUT, IN, code=request.param), torch.randn(OUT, generator=torch.Generator().manual_seed(2))
    )


@pytest.fixture
def ways(monkeypatch):
    """Which way each call took: "direct" or "operator"."""
    seen = []
    past, through = direct.DirectLinear.__call__, torch.ops.optimum_sab.binary_linear

    def count(self, *arguments):
        output = past(self, *arguments)
        if output is not None:
            seen.append("direct")
        return output

    def count_operator(*arguments):
        seen.append("operator")
        return through(*arguments)

    monkeypatch.setattr(direct.DirectLinear, "__call__", count)
    monkeypatch.setattr("optimum_sab.nn.linear.binary_linear", _counting(count_operator))
    return seen


def _counting(call):
    from optimum_sab.ops.operands import refuse_forward_mode

    def binary_linear(x, tensors, shape, bias, layout, backend):
        refuse_forward_mode(x)
        return call(x, bias, tensors, layout, backend, shape)

    return binary_linear


def inputs(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_operator(linear, x):
    return torch.ops.optimum_sab.binary_linear(x, linear.bias, linear.tensors, linear.layout, None, linear.shape.text)


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (1, 1, IN), (2, 3, IN), (17, IN), (0, IN), (2, 0, IN)])
@pytest.mark.parametrize("bias", [True, False])
def test_direct_output_has_the_operator_s_bits(linear, ways, dtype, shape, bias):
    linear.to(dtype)
    if not bias:
        linear.bias = None
    x = inputs(*shape, dtype=dtype)
    found = linear(x)
    assert ways == ["direct"]
    expected = by_operator(linear, x)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype) == ((*shape[:-1], OUT), dtype)
    assert torch.equal(found, expected)


def test_direct_input_need_not_be_contiguous(linear, ways):
    views = [inputs(IN, 6).T, inputs(3, 2 * IN)[:, ::2], inputs(1, IN).expand(3, -1), inputs(2, IN, 3).transpose(1, 2)]
    for x in views:
        assert not x.is_contiguous()
        assert torch.equal(linear(x), linear(x.contiguous()))
    assert set(ways) == {"direct"}


def test_direct_output_is_a_tensor_of_its_own(linear):
    with torch.inference_mode():
        x = inputs(2, IN)
        first, second = linear(x), linear(x)
        assert first.is_inference()
        first.fill_(float("nan"))
        assert bool(second.isfinite().all())
    x = inputs(2, IN).requires_grad_()
    with torch.no_grad():
        assert not linear(x).requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_direct_output_of_a_token_that_is_not_finite_spoils_no_other(linear, value):
    x = inputs(4, IN)
    x[1, 7] = value
    found = linear(x)
    assert not bool(found[1].isfinite().any()) and bool(found[[0, 2, 3]].isfinite().all())


# -- the operator is called where somebody listens ---------------------------------------------------------------------


def test_gradients_go_through_the_operator(linear, ways):
    x = inputs(2, IN).requires_grad_()
    linear(x).sum().backward()
    assert ways == ["operator"] and x.grad is not None
    linear.bias.requires_grad_()
    linear(x.detach()).sum().backward()
    assert ways == ["operator"] * 2
    torch.testing.assert_close(linear.bias.grad, torch.full((OUT,), 2.0))


class Dispatched(TorchDispatchMode):
    def __init__(self):
        self.names = []
        super().__init__()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(function.name())
        return function(*arguments, **(options or {}))


class Overridden(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


class Tagged(torch.Tensor):
    pass


def test_dispatch_modes_and_profilers_see_the_operator(linear):
    x = inputs(1, IN)
    with torch.no_grad(), Dispatched() as mode:
        linear(x)
    assert mode.names == [OPERATOR]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        linear(x)
    assert OPERATOR in [event.name for event in profile.events()]


def test_whoever_changes_what_operators_do_gets_the_operator(linear, ways):
    x = inputs(2, IN)
    expected = linear(x)
    ways.clear()
    with Overridden():
        assert torch.equal(linear(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
    with forward_ad.dual_level():
        assert torch.equal(linear(x), expected)
    tagged = linear(x.as_subclass(Tagged))
    assert isinstance(tagged, Tagged) and torch.equal(tagged.as_subclass(torch.Tensor), expected)
    assert linear(x.double()).dtype == torch.float64
    negative = torch.complex(x, -x).conj().imag  # x, stored as −x and a mark
    assert negative.is_neg() and torch.equal(linear(negative), expected)
    with force_backend("reference"):
        torch.testing.assert_close(linear(x), expected)
    linear.backend = "reference"
    torch.testing.assert_close(linear(x), expected)
    assert ways == ["operator"] * 8


def test_environment_that_names_another_backend_is_heeded_at_every_call(linear, ways, monkeypatch):
    for name, way in (("reference", "operator"), ("cpu", "direct"), ("", "direct"), ("auto", "direct")):
        ways.clear()
        monkeypatch.setenv("OPTIMUM_SAB_BACKEND", name)
        linear(inputs(1, IN))
        assert ways == [way]


def test_traced_layer_computes_with_other_inputs(linear):
    x, y = inputs(1, IN), inputs(1, IN, seed=2)
    with torch.no_grad():
        traced = torch.jit.trace(linear, x, check_trace=False)
        assert torch.equal(traced(y), linear(y))


def test_function_transforms_are_not_passed_by(linear):
    """The operator knows none of them, and says so."""
    x = inputs(3, IN)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(linear, (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="Batching rule not implemented for optimum_sab::binary_linear"):
        torch.func.vmap(linear)(x)


def test_exported_layer_holds_the_operator(linear):
    program = torch.export.export(linear, (inputs(2, IN),))
    assert any(OPERATOR.replace("::", ".") in str(node.target) for node in program.graph.nodes)
    y = inputs(2, IN, seed=2)
    assert torch.equal(program.module()(y), linear(y))


def test_hooks_are_called(linear):
    seen = []
    linear.register_forward_pre_hook(lambda module, arguments: seen.append("before"))
    linear.register_forward_hook(lambda module, arguments, output: seen.append(tuple(output.shape)))
    linear(inputs(1, IN))
    assert seen == ["before", (1, OUT)]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, IN + 1), f"last dimension is {IN + 1}, the layer takes {IN}"),
        (torch.zeros(3, 0), "last dimension is 0"),
        (torch.tensor(1.0), "last dimension is missing"),
        (torch.zeros(3, IN, dtype=torch.int64), r"torch\.int64"),
        (torch.zeros(3, IN, device="meta"), "the input is on meta, the layer on cpu"),
    ],
)
def test_what_the_operator_refuses_is_refused(linear, x, message):
    linear(inputs(1, IN))
    with torch.no_grad(), pytest.raises(ConfigError, match=message):
        linear(x)


@pytest.mark.parametrize("size", [0, OUT - 1, OUT + 1])
def test_bias_that_does_not_fit_is_refused(linear, size):
    linear.bias = nn.Parameter(torch.zeros(size), requires_grad=False)
    with pytest.raises(RuntimeError, match="expand"):
        linear(inputs(1, IN))


def test_bias_on_another_device_is_refused(random_packed):
    with pytest.raises(ConfigError, match="the bias is on meta, the layer on the CPU"):
        kernel.linear(inputs(1, IN), random_packed(OUT, IN), torch.zeros(OUT, device="meta"))


def test_bias_of_another_dtype_is_rounded_to_the_input_s(linear, ways):
    x = inputs(2, IN, dtype=torch.bfloat16)
    found = linear(x)
    linear.bfloat16()
    assert torch.equal(found, linear(x))
    assert ways == ["operator", "direct"]


def test_layer_that_was_never_loaded_is_refused(linear):
    linear(inputs(1, IN))
    with pytest.raises(ConfigError, match="on meta: it was never loaded"):
        linear.to("meta")(inputs(1, IN))


@pytest.mark.parametrize("damage", [lambda t: t[..., :-1], lambda t: t[:0], lambda t: t.to(torch.int64)])
@pytest.mark.parametrize("name", ["weight", "residual_sign", "row_scale", "row_exponent", "col_scale"])
def test_tensor_that_was_changed_into_another_is_refused(linear, name, damage):
    """Also where the memory begins at the same address: C would read past its end."""
    linear(inputs(1, IN))
    parameter = getattr(linear, name)
    parameter.data = damage(parameter.data)
    with pytest.raises(FormatError, match=name):
        linear(inputs(1, IN))


VIEWS = {  # of the same memory: as many bytes from the same address on
    "dtype": lambda t: t.view({1: torch.bool, 2: torch.float16, 4: torch.float32}[t.element_size()]),
    "order": lambda t: t[..., :1].expand_as(t) if t.shape[-1] > 1 else t[:, :1].expand_as(t),
    "shape": lambda t: t.flatten() if t.dim() > 1 else t[None],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    "name", ["weight", "residual_sign", "residual_index", "row_scale", "row_exponent", "col_scale"]
)
def test_known_memory_seen_in_another_way_is_refused(linear, random_packed, name, view):
    x, packed = inputs(1, IN), random_packed(OUT, IN)
    before = linear(x)
    parameter = getattr(linear, name)
    whole = parameter.data
    parameter.data = VIEWS[view](whole)
    assert (parameter.data_ptr(), parameter.nbytes) == (whole.data_ptr(), whole.nbytes)
    with pytest.raises(FormatError, match=name):
        linear(x)
    kernel.linear(x, packed)
    packed.tensors[name] = VIEWS[view](packed.tensors[name])
    with pytest.raises(FormatError, match=name):
        kernel.linear(x, packed)
    parameter.data = whole
    assert torch.equal(linear(x), before)


def test_layers_that_share_a_tensor_compute_with_their_own(linear, random_packed):
    """A layer is looked up by its first tensor's address."""
    x, first = inputs(2, IN), random_packed(OUT, IN)
    second = random_packed(OUT, IN, seed=5)
    second.tensors["weight"] = first.tensors["weight"]
    expected = [x @ each.dequantize().T for each in (first, second)]
    for _ in range(2):
        for each, wanted in zip((first, second), expected, strict=True):
            torch.testing.assert_close(kernel.linear(x, each), wanted)


def test_no_memory_is_an_error(linear, monkeypatch):
    class Full:
        kind = compiler.load_library().kind

        def sab_linear(self, *arguments):
            return 1

    monkeypatch.setattr(direct, "usable_library", Full)
    with pytest.raises(MemoryError, match=f"{OUT} × {IN}"):
        linear(inputs(1, IN))


# -- tensors that come and go ------------------------------------------------------------------------------------------


def test_tensors_that_were_replaced_are_computed_with(linear, random_packed):
    x = inputs(2, IN)
    first = linear(x)
    other = SABLinear.from_packed(random_packed(OUT, IN, seed=5, code=linear.settings.code), linear.bias)
    expected = other(x)
    assert not torch.equal(first, expected)
    kept = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    for put in (_into_the_dict, _as_data, _loaded, _assigned):
        put(linear, other.state_dict())
        assert torch.equal(linear(x), expected), put
        put(linear, kept)
        assert torch.equal(linear(x), first), put


def test_compiled_layer_computes_with_tensors_that_were_replaced(linear, random_packed):
    """Moved, loaded or copied: a graph is given the layer's tensors at every call, and the operator keeps none."""
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    x = inputs(2, IN)
    first = compiled(x)
    assert torch.equal(first, linear(x))
    other = SABLinear.from_packed(random_packed(OUT, IN, seed=5, code=linear.settings.code), linear.bias)
    expected = other(x)
    kept = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    for put in (_into_the_dict, _as_data, _loaded, _assigned):
        put(linear, other.state_dict())
        assert torch.equal(compiled(x), expected), put
        copied = copy.deepcopy(linear)
        put(linear, kept)
        assert torch.equal(compiled(x), first), put
        assert torch.equal(torch.compile(copied, fullgraph=True, backend="aot_eager")(x), expected)
    swapped = torch.compile(
        lambda tensors: torch.func.functional_call(linear, tensors, (x,)), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(swapped(dict(other.named_parameters())), expected)
    assert torch.equal(swapped(dict(linear.named_parameters())), first)


def _into_the_dict(linear, tensors):
    """As accelerate brings offloaded tensors."""
    for name, tensor in tensors.items():
        linear._parameters[name] = nn.Parameter(tensor.clone(), requires_grad=False)


def _as_data(linear, tensors):
    for name, tensor in tensors.items():
        linear._parameters[name].data = tensor.clone()


def _loaded(linear, tensors):
    linear.load_state_dict(tensors)


def _assigned(linear, tensors):
    linear.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)


def test_known_layers_keep_no_tensors_and_are_not_without_number(random_packed, monkeypatch):
    monkeypatch.setattr(layer, "_known", {})
    monkeypatch.setattr(layer, "_MOST_KNOWN", 3)
    held = []
    for seed in range(5):
        packed = SABLinear.from_packed(random_packed(OUT, IN, seed=seed))
        packed(inputs(1, IN))
        held.append(packed)
        assert 0 < len(layer._known) <= 3
    assert not any(isinstance(each, torch.Tensor) for seen, _ in layer._known.values() for each in seen)


def test_layers_of_all_threads_compute_while_their_tensors_come_and_go(random_packed):
    codes = ("none", "trellis16", "trellis16")
    packed, x = [random_packed(OUT, IN, seed=seed, code=code) for seed, code in enumerate(codes)], inputs(1, IN)
    expected = [kernel.linear(x, each) for each in packed]
    wrong = []

    def compute(number):
        for _ in range(100):
            fresh = SABLinear.from_packed(packed[number])
            _into_the_dict(fresh, dict(fresh.state_dict()))
            if not torch.equal(fresh(x), expected[number]):
                wrong.append(number)

    callers = [threading.Thread(target=compute, args=(number % 3,)) for number in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_settings_do_not_matter_to_the_way(random_packed, ways):
    for settings in ({"residual_planes": 0}, {"block_size": 64, "base_planes": 2, "row_scale": "fp16"}):
        packed = random_packed(OUT, IN, **settings)
        assert LayerSettings(**settings).base_planes == packed.settings.base_planes
        x = inputs(3, IN)
        torch.testing.assert_close(SABLinear.from_packed(packed)(x), x @ packed.dequantize().T, rtol=1e-4, atol=1e-3)
    assert ways == ["direct"] * 2
