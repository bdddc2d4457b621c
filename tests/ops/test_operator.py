"""The operators against the dense product, with every backend and in both layouts."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear

from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError
from optimum_sab.ops import force_backend
from optimum_sab.ops.backends import why_not
from optimum_sab.ops.operator import binary_linear, operator_names, stacked_linear
from optimum_sab.ops.shape import LayerShape
from optimum_sab.ops.verification import sample_weight

ROWS, COLUMNS = 40, 140
SIZES = (32, 8)
DEFAULT = LayerSettings()
SETTINGS = [
    DEFAULT,
    LayerSettings(block_size=64, base_planes=2, row_scale="fp16"),
    LayerSettings(residual_planes=0),
]
GPU = torch.cuda.is_available()
# Error of one rounding to the dtype, and of fp32 sums: relative to the largest output.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
BACKENDS = ["reference", "cpu", "triton"]
WAYS = [(backend, layout) for backend in BACKENDS for layout in ("stored", "kernel")]
EAGER = [("reference", "stored"), ("cpu", "stored"), ("triton", "kernel")]


def biases(bias, sizes=SIZES):
    """A bias of the whole as those of the stacked layers."""
    return () if bias is None else list(bias.detach().split(sizes))


class Layer:
    """A layer's tensors for one backend, in one layout, on a device on which that backend computes."""

    def __init__(self, backend, layout="stored", settings=DEFAULT, rows=ROWS, columns=COLUMNS):
        self.backend, self.layout = backend, layout
        self.device = torch.device("cuda" if GPU and backend == "triton" else "cpu")
        if backend == "triton" or layout == "kernel":
            pytest.importorskip("triton")
        problem = why_not(backend, self.device)
        if problem is not None:
            pytest.skip(f"{backend}: {problem}")
        packed = sample_weight(settings, rows, columns)
        self.dense = packed.dequantize().double()
        self.shape = LayerShape.of(rows, columns, settings)
        named = {name: tensor.to(self.device) for name, tensor in packed.tensors.items()}
        if layout == "kernel":
            from sab_kernels import to_kernel_layout

            named = to_kernel_layout(named, self.shape.geometry)
        self.tensors = [named[name] for name in self.shape.names]

    def random(self, *shape, dtype=torch.float32, seed=1):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self.device, dtype)

    def __call__(self, x, bias=None):
        return binary_linear(x, self.tensors, self.shape, bias, self.layout, self.backend)

    def stacked(self, x, bias=None, sizes=SIZES):
        return stacked_linear(x, self.tensors, self.shape, sizes, biases(bias, sizes), self.backend)

    def expected(self, x, bias=None):
        out = x.detach().cpu().double() @ self.dense.T
        return out if bias is None else out + bias.detach().cpu().double()


def assert_near(found, expected, dtype, times=1):
    assert found.dtype == dtype
    assert found.shape == expected.shape
    error = (found.detach().cpu().double() - expected).abs().max() / expected.abs().max()
    assert error <= times * TOLERANCE[dtype], float(error)  # NaN is not <= either


def dtypes_of(backend):
    return [torch.float32, torch.float16, torch.bfloat16]


ways = pytest.mark.parametrize(("backend", "layout"), WAYS)
eager = pytest.mark.parametrize(("backend", "layout"), EAGER)
backends = pytest.mark.parametrize("backend", BACKENDS)
kernel_dtypes = pytest.mark.parametrize(
    ("backend", "layout", "dtype"), [(b, layout, dtype) for b, layout in WAYS for dtype in dtypes_of(b)]
)


# -- values ------------------------------------------------------------------------------------------------------------


@kernel_dtypes
@pytest.mark.parametrize("settings", SETTINGS, ids=["1+1", "2+1 fp16", "1+0"])
def test_linear_is_the_dense_product(backend, layout, dtype, settings):
    layer = Layer(backend, layout, settings, columns=200)
    bias = layer.random(ROWS, seed=2)
    for tokens in (1, 20):  # a few and more take different kernels
        x = layer.random(tokens, 200, dtype=dtype)
        assert_near(layer(x), layer.expected(x), dtype)
        assert_near(layer(x, bias), layer.expected(x, bias), dtype, times=2)  # the bias is rounded to the dtype too


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("base_planes", [1, 2])
def test_linear_with_a_code_is_the_dense_product_forward_and_backward(backend, base_planes, dtype):
    layer = Layer(backend, settings=LayerSettings(code="trellis16", base_planes=base_planes), columns=200)
    for tokens in (1, 20):
        x = layer.random(tokens, 200, dtype=dtype).requires_grad_()
        pull = layer.random(tokens, ROWS, dtype=dtype, seed=3)
        out = layer(x)
        out.backward(pull)
        assert_near(out, layer.expected(x), dtype)
        assert_near(x.grad, pull.double() @ layer.dense, dtype, times=4)


@pytest.mark.parametrize(("name", "layout"), WAYS)
def test_linear_without_a_backend_argument_uses_the_forced_one(name, layout, monkeypatch):
    layer = Layer(name, layout)
    layer.backend = None
    used = []
    from optimum_sab.ops import operator

    decide, directly = operator.backend_name, operator._direct

    def direct(*arguments):
        found = directly(*arguments)
        if found is not None:
            used.append("cpu")
        return found

    monkeypatch.setattr(operator, "_direct", direct)
    monkeypatch.setattr(operator, "backend_name", lambda *a: used.append(decide(*a)) or used[-1])
    x = layer.random(3, COLUMNS)
    with force_backend(name):
        assert_near(layer(x), layer.expected(x), torch.float32)
    assert used == [name]


@ways
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 2)])
def test_linear_keeps_leading_dimensions(backend, layout, leading):
    layer = Layer(backend, layout)
    x = layer.random(*leading, COLUMNS)
    assert_near(layer(x), layer.expected(x), torch.float32)


@ways
@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_linear_of_no_tokens_is_empty_forward_and_backward(backend, layout, leading):
    layer = Layer(backend, layout)
    x = layer.random(*leading, COLUMNS).requires_grad_()
    out = layer(x)
    assert out.shape == (*leading, ROWS)
    out.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_gradient_of_a_bias_without_tokens_is_zero(leading):
    bias = torch.zeros(ROWS, requires_grad=True)
    Layer("reference")(torch.zeros(*leading, COLUMNS), bias).sum().backward()
    assert torch.equal(bias.grad, torch.zeros(ROWS))


@eager
def test_linear_accepts_inputs_that_are_not_contiguous(backend, layout):
    layer = Layer(backend, layout)
    views = [
        layer.random(COLUMNS, 6).T,
        layer.random(3, 2 * COLUMNS)[:, ::2],
        layer.random(6, COLUMNS)[::2],
        layer.random(1, COLUMNS).expand(3, -1),
        layer.random(3, COLUMNS + 1)[:, 1:],
        layer.random(2, COLUMNS, 3).transpose(1, 2),
    ]
    for view in views:
        assert not view.is_contiguous()
        assert_near(layer(view), layer.expected(view), torch.float32)


@ways
def test_linear_leaves_input_weight_and_bias_as_they_were(backend, layout):
    layer = Layer(backend, layout)
    x, bias = layer.random(3, COLUMNS), layer.random(ROWS)
    before = [t.clone() for t in (x, bias, *layer.tensors)]
    layer(x, bias).fill_(float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, bias, *layer.tensors)))


@eager
def test_linear_of_double_inputs_is_double(backend, layout):
    layer = Layer(backend, layout)
    x = layer.random(3, COLUMNS, dtype=torch.float64).requires_grad_()
    out = layer(x, layer.random(ROWS))
    assert_near(out, layer.expected(x, layer.random(ROWS)), torch.float64)
    out.sum().backward()
    assert_near(x.grad, layer.dense.sum(0).expand(3, -1), torch.float64)


@eager
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_linear_of_a_token_that_is_not_finite_spoils_no_other(backend, layout, bad):
    layer = Layer(backend, layout)
    x = layer.random(4, COLUMNS)
    x[1, 7] = bad
    out = layer(x)
    assert not bool(out[1].isfinite().any())
    assert_near(out[[0, 2, 3]], layer.expected(x[[0, 2, 3]]), torch.float32)


# -- refusals ----------------------------------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("width", [0, 1, COLUMNS - 1, COLUMNS + 1])
def test_linear_refuses_another_width(backend, layout, width):
    layer = Layer(backend, layout)
    with pytest.raises(ConfigError, match=f"last dimension is {width}, the layer takes {COLUMNS}"):
        layer(layer.random(3, width))


def test_linear_refuses_a_number():
    layer = Layer("reference")
    with pytest.raises(ConfigError, match=f"last dimension is missing, the layer takes {COLUMNS}"):
        layer(torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("autocast", [False, True])
def test_linear_refuses_an_input_that_is_not_floating(dtype, autocast):
    layer = Layer("reference")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(ConfigError, match=str(dtype)):
        layer(torch.zeros(3, COLUMNS, dtype=dtype))


@pytest.mark.parametrize("grad", [False, True])
def test_linear_refuses_a_weight_on_meta(grad):
    layer = Layer("reference")
    layer.tensors = [tensor.to("meta") for tensor in layer.tensors]
    with pytest.raises(ConfigError, match="on meta: it was never loaded"):
        layer(torch.zeros(3, COLUMNS, requires_grad=grad))


def test_linear_refuses_an_input_on_another_device():
    layer = Layer("reference")
    with pytest.raises(ConfigError, match="the input is on meta, the layer on cpu; move one"):
        layer(torch.zeros(3, COLUMNS, device="meta"))


def test_linear_refuses_an_unknown_backend():
    layer = Layer("reference")
    layer.backend = "gpu"
    with pytest.raises(ConfigError, match="'gpu' is no backend; use one of auto, triton, cpu, reference"):
        layer(torch.zeros(3, COLUMNS))


def test_linear_wholly_on_meta_has_the_shape_and_dtype():
    layer = Layer("reference")
    layer.tensors = [tensor.to("meta") for tensor in layer.tensors]
    layer.backend = None
    out = layer(torch.zeros(2, 3, COLUMNS, device="meta", dtype=torch.bfloat16))
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, ROWS), torch.bfloat16, "meta")


# -- gradients ---------------------------------------------------------------------------------------------------------


@kernel_dtypes
def test_gradients_are_the_dense_layer_s(backend, layout, dtype):
    layer = Layer(backend, layout)
    x = layer.random(2, 3, COLUMNS, dtype=dtype).requires_grad_()
    bias = layer.random(ROWS, dtype=dtype, seed=2).requires_grad_()
    pull = layer.random(2, 3, ROWS, dtype=dtype, seed=3)
    layer(x, bias).backward(pull)
    assert_near(x.grad, pull.cpu().double() @ layer.dense, dtype, times=4)  # the weight itself is rounded to 16 bits
    assert_near(bias.grad, pull.cpu().double().sum((0, 1)), dtype)


@eager
def test_gradient_is_that_of_the_values(backend, layout):
    """Central differences of a linear map are exact up to rounding."""
    layer = Layer(backend, layout)
    x, pull = layer.random(1, COLUMNS).requires_grad_(), layer.random(1, ROWS, seed=3)
    layer(x).backward(pull)
    for j in (0, 31, 128, COLUMNS - 1):
        step = torch.zeros_like(x)
        step[0, j] = 1.0
        with torch.no_grad():
            change = layer(x + step) - layer(x - step)
        assert float((change * pull).sum() / 2) == pytest.approx(float(x.grad[0, j]), abs=1e-4)


@eager
def test_gradient_goes_to_those_who_ask_for_it(backend, layout):
    layer = Layer(backend, layout)
    x, bias = layer.random(3, COLUMNS), layer.random(ROWS)
    assert not layer(x, bias).requires_grad
    out = layer(x, bias.requires_grad_())
    out.sum().backward()
    assert x.grad is None
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 3.0))
    other = layer.random(ROWS)
    layer(x.requires_grad_(), other).sum().backward()
    assert other.grad is None
    assert_near(x.grad, layer.dense.sum(0).expand(3, -1), torch.float32)
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in layer.tensors)


@eager
def test_gradient_of_a_half_bias_under_float_inputs_has_the_bias_s_dtype(backend, layout):
    layer = Layer(backend, layout)
    bias = layer.random(ROWS, dtype=torch.float16).requires_grad_()
    layer(layer.random(3, COLUMNS), bias).sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, 3.0))


@eager
@pytest.mark.parametrize("leading", [(2,), (2, 3)])
def test_output_may_be_changed_in_place_before_gradients_are_taken(backend, layout, leading):
    """As Llama 4 does in training; autograd refuses that of a view that an operator returns."""
    layer = Layer(backend, layout)
    x = layer.random(*leading, COLUMNS).requires_grad_()
    out = layer(x)
    out.mul_(2.0)
    out.sum().backward()
    assert_near(x.grad, 2 * layer.dense.sum(0).expand(*leading, -1), torch.float32)


@eager
def test_gradient_of_a_layer_used_twice_is_the_sum(backend, layout):
    layer = Layer(backend, layout)
    x, y = layer.random(2, COLUMNS).requires_grad_(), layer.random(4, COLUMNS, seed=2).requires_grad_()
    bias = layer.random(ROWS).requires_grad_()
    (layer(x, bias).sum() + 2 * layer(x, bias).sum() + layer(y, bias).sum()).backward()
    assert_near(x.grad, 3 * layer.dense.sum(0).expand(2, -1), torch.float32)
    assert_near(y.grad, layer.dense.sum(0).expand(4, -1), torch.float32)
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 2 + 4 + 4.0))


@eager
def test_gradient_of_one_of_an_expanded_output_is_right(backend, layout):
    """``sum`` hands down a gradient with strides of zero."""
    layer = Layer(backend, layout)
    x = layer.random(2, 3, COLUMNS).requires_grad_()
    layer(x)[:, 1].sum().backward()
    assert_near(x.grad[:, 1], layer.dense.sum(0).expand(2, -1), torch.float32)
    assert not x.grad[:, [0, 2]].any()


def test_backward_keeps_nothing_dense():
    layer = Layer("reference")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(layer.random(3, COLUMNS).requires_grad_())
    assert out.requires_grad
    assert sum(t.numel() for t in kept if t.is_floating_point()) < ROWS * COLUMNS


# -- stacked -----------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 10), (0,)])
def test_stacked_outputs_are_the_rows_of_the_whole(backend, leading):
    layer = Layer(backend, "kernel")
    x, bias = layer.random(*leading, COLUMNS), layer.random(ROWS, seed=2)
    outputs = layer.stacked(x, bias)
    assert [out.shape for out in outputs] == [(*leading, size) for size in SIZES]
    assert all(out.is_contiguous() for out in outputs)
    if x.numel():
        assert_near(torch.cat(outputs, -1), layer.expected(x, bias), torch.float32)


@backends
def test_stacked_outputs_equal_those_of_the_layers_alone(backend):
    from sab_kernels import to_kernel_layout

    whole = Layer(backend, "kernel")
    x = whole.random(6, COLUMNS)
    stored = sample_weight(DEFAULT, ROWS, COLUMNS).tensors
    for out, start, size in zip(whole.stacked(x), (0, SIZES[0]), SIZES):
        rows = slice(start, start + size)
        part = {
            **stored,
            "weight": stored["weight"][:, rows],
            "residual_sign": stored["residual_sign"][:, rows],
            "row_scale": stored["row_scale"][..., rows],
            "row_exponent": stored["row_exponent"][rows],
        }
        shape = LayerShape.of(size, COLUMNS, DEFAULT)
        named = to_kernel_layout({name: t.contiguous().to(whole.device) for name, t in part.items()}, shape.geometry)
        alone = binary_linear(x, [named[n] for n in shape.names], shape, None, "kernel", backend)
        torch.testing.assert_close(out, alone, rtol=1e-6, atol=1e-6)


@backends
@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (5,)])
def test_stacked_outputs_share_no_memory(backend, leading):
    layer = Layer(backend, "kernel")
    first, second = layer.stacked(layer.random(*leading, COLUMNS))
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    before = second.clone()
    first.fill_(float("nan"))
    assert torch.equal(second, before)


@backends
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_stacked_gradients_come_from_the_outputs_that_are_used(backend, used):
    layer = Layer(backend, "kernel")
    x = layer.random(2, 3, COLUMNS).requires_grad_()
    pulls = [layer.random(2, 3, size, seed=7 + size) for size in SIZES]
    outputs = layer.stacked(x, layer.random(ROWS))
    sum((outputs[i] * pulls[i]).sum() for i in used).backward()
    pull = torch.cat([p if i in used else torch.zeros_like(p) for i, p in enumerate(pulls)], -1).cpu().double()
    assert_near(x.grad, pull @ layer.dense, torch.float32)


@backends
def test_stacked_gradients_of_outputs_pulled_one_after_the_other_add_up(backend):
    layer = Layer(backend, "kernel")
    x = layer.random(3, COLUMNS).requires_grad_()
    outputs = layer.stacked(x)
    outputs[0].sum().backward(retain_graph=True)
    outputs[1].sum().backward()
    assert_near(x.grad, layer.dense.sum(0).expand(3, -1), torch.float32)


def test_stacked_refuses_what_linear_refuses():
    layer = Layer("reference", "kernel")
    with pytest.raises(ConfigError, match="last dimension is 7"):
        layer.stacked(torch.zeros(3, 7))
    with pytest.raises(ConfigError, match=r"torch\.int64"):
        layer.stacked(torch.zeros(3, COLUMNS, dtype=torch.int64))


# -- as an operator ----------------------------------------------------------------------------------------------------


@eager
@pytest.mark.parametrize("leading", [pytest.param((1,), marks=pytest.mark.full), (2, 3)])
def test_operators_pass_opcheck(backend, layout, leading):
    """All of opcheck: schema, registration of gradients, fakes, and dynamic shapes under AOT autograd."""
    layer = Layer(backend, layout)
    assert len(operator_names()) == 3
    linear_, stacked, transposed = (getattr(torch.ops.optimum_sab, n.partition("::")[2]) for n in operator_names())
    x, bias = layer.random(*leading, COLUMNS).requires_grad_(), layer.random(ROWS).requires_grad_()
    weight = (layer.tensors, layout, backend, layer.shape.text)
    torch.library.opcheck(linear_.default, (x, bias, *weight))
    torch.library.opcheck(linear_.default, (x.detach(), None, *weight))
    torch.library.opcheck(transposed.default, (layer.random(*leading, ROWS), *weight))
    if layout == "kernel":
        torch.library.opcheck(stacked.default, (x, biases(bias), SIZES, *weight))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("leading", [pytest.param((1,), marks=pytest.mark.full), (2, 3)])
def test_stacked_operator_passes_opcheck_without_the_kernels(backend, leading):
    layer = Layer(backend, "kernel")
    x, bias = layer.random(*leading, COLUMNS).requires_grad_(), layer.random(ROWS).requires_grad_()
    operator = torch.ops.optimum_sab.stacked_linear.default
    torch.library.opcheck(operator, (x, biases(bias), SIZES, layer.tensors, "kernel", backend, layer.shape.text))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_autocast_gives_the_dtype_and_values_of_a_dense_linear(backend, dtype):
    """The dense weight and bias have the input's dtype, as a model's have."""
    layer, stack = Layer(backend), Layer(backend, "kernel")
    x, bias = layer.random(3, COLUMNS, dtype=dtype), layer.random(ROWS, seed=2).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        dense = linear(x, layer.dense.to(dtype), bias)
        for found in (layer(x, bias), torch.cat(stack.stacked(x, bias), -1)):
            assert found.dtype == dense.dtype
            assert_near(found, dense.double(), found.dtype, times=2)
    assert layer(x, bias).dtype == dtype


def test_autocast_that_is_off_changes_nothing():
    layer = Layer("reference")
    x = layer.random(3, COLUMNS)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert torch.equal(layer(x), layer(x).float())
        assert layer(x).dtype == torch.float32


def test_autocast_gradient_has_the_input_s_dtype():
    layer, stack = Layer("reference"), Layer("reference", "kernel")
    for call in (layer, lambda x, b: torch.cat(stack.stacked(x, b), -1)):
        x, bias = layer.random(3, COLUMNS).requires_grad_(), layer.random(ROWS).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = call(x, bias)
        out.float().sum().backward()
        assert x.grad.dtype == torch.float32
        assert bias.grad is None if call is not layer else bias.grad.dtype == torch.float32
        assert_near(x.grad.bfloat16(), layer.dense.sum(0).expand(3, -1), torch.bfloat16, times=2)


@eager
@pytest.mark.parametrize("compiler", [pytest.param("aot_eager", marks=pytest.mark.full), "inductor"])
def test_compiled_linear_is_one_graph_for_every_number_of_tokens(backend, layout, compiler):
    layer = Layer(backend, layout)
    counter = CompileCounterWithBackend(compiler)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, bias: layer(x * 2, bias) + 1, fullgraph=True, backend=counter)
    bias = layer.random(ROWS)
    for tokens in (3, 5, 12):
        x = layer.random(tokens, COLUMNS)
        torch._dynamo.mark_dynamic(x, 0)
        assert_near(compiled(x, bias), layer.expected(2 * x, bias) + 1, torch.float32)
    assert counter.frame_count == 1


@eager
def test_compiled_linear_without_a_mark_becomes_dynamic_by_itself(backend, layout):
    layer = Layer(backend, layout)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (3, 5, 7, 11, 13):
        x = layer.random(2, tokens, COLUMNS)
        assert_near(compiled(x), layer.expected(x), torch.float32)
    assert counter.frame_count <= 2


@eager
def test_compiled_gradients_are_the_eager_ones(backend, layout):
    layer = Layer(backend, layout)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, bias: layer(x, bias).sin(), fullgraph=True, backend="aot_eager")
    for call in (compiled, compiled):
        x, bias = layer.random(3, COLUMNS).requires_grad_(), layer.random(ROWS).requires_grad_()
        call(x, bias).sum().backward()
        pull = layer.expected(x, bias).cos()
        assert_near(x.grad, pull @ layer.dense, torch.float32, times=4)
        assert_near(bias.grad, pull.sum(0), torch.float32, times=4)


@backends
def test_compiled_stacked_is_one_graph(backend):
    layer = Layer(backend, "kernel")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda x: [out * 2 for out in layer.stacked(x)], fullgraph=True, backend=counter)
    for tokens in (3, 5, 12):
        x = layer.random(tokens, COLUMNS)
        torch._dynamo.mark_dynamic(x, 0)
        assert_near(torch.cat(compiled(x), -1), 2 * layer.expected(x), torch.float32)
    assert counter.frame_count == 1


def test_compiled_linear_under_autocast_has_its_dtype():
    layer = Layer("reference")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    x = layer.random(3, COLUMNS)
    assert_near(call(x), layer.expected(x), torch.bfloat16, times=2)


def test_compiled_linear_of_another_width_is_refused():
    layer = Layer("reference")
    torch._dynamo.reset()
    with pytest.raises(Exception, match="last dimension is 7"):  # dynamo wraps the error in its own
        torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.zeros(3, 7))


def test_forward_mode_is_refused_rather_than_zero():
    layer = Layer("reference")
    x = layer.random(2, COLUMNS)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        assert_near(layer(x), layer.expected(x), torch.float32)  # a level alone is no reason
