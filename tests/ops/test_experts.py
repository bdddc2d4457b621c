"""The operator for routed rows against every expert's own dense product, with every backend and in both layouts."""

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError
from optimum_sab.format.random_weight import random_packed
from optimum_sab.ops import force_backend
from optimum_sab.ops.backends import why_not
from optimum_sab.ops.experts import ExpertWeights, experts_linear
from optimum_sab.ops.operator import binary_linear
from optimum_sab.ops.shape import LayerShape

EXPERTS, ROWS, COLUMNS = 6, 40, 140
DEFAULT = LayerSettings()
SETTINGS = {
    "1+1": DEFAULT,
    "2+1 fp16": LayerSettings(block_size=64, base_planes=2, row_scale="fp16"),
    "1+0": LayerSettings(residual_planes=0),
    "coded": LayerSettings(code="trellis16"),
    "coded 2+1": LayerSettings(code="trellis16", base_planes=2),
}
# Error of one rounding to the dtype, and of fp32 sums: relative to the largest output.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WAYS = [("reference", "stored"), ("cpu", "stored"), ("triton", "kernel")]
TURNED = [("reference", "kernel"), ("cpu", "kernel"), ("triton", "stored")]


class Experts:
    """A stack of packed layers for one backend, in one layout, on a device on which that backend computes."""

    def __init__(self, backend, layout="stored", settings=DEFAULT, count=EXPERTS):
        self.backend, self.layout, self.count = backend, layout, count
        self.device = torch.device("cuda" if torch.cuda.is_available() and backend == "triton" else "cpu")
        if backend == "triton" or layout == "kernel":
            kernels = pytest.importorskip("sab_kernels")
            if backend == "triton" and not hasattr(kernels, "experts_linear"):
                pytest.skip("these kernels have none for experts")
        problem = why_not(backend, self.device)
        if problem is not None:
            pytest.skip(f"{backend}: {problem}")
        layers = [random_packed(ROWS, COLUMNS, settings, seed) for seed in range(count)]
        self.dense = torch.stack([layer.dequantize().double() for layer in layers])
        self.shape = LayerShape.of(ROWS, COLUMNS, settings)
        named = [{name: tensor.to(self.device) for name, tensor in layer.tensors.items()} for layer in layers]
        if layout == "kernel":
            named = [kernels.to_kernel_layout(each, self.shape.geometry) for each in named]
        self.tensors = [torch.stack([each[name] for each in named]) for name in self.shape.names]

    def random(self, *shape, dtype=torch.float32, seed=1):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self.device, dtype)

    def routed(self, pairs, seed=5, low=0):
        """Random experts; all but one in the middle, which gets none."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(low, self.count + (low < 0), (pairs,), generator=generator)
        chosen[chosen == self.count // 2] = 0
        return chosen.to(self.device)

    def __call__(self, x, experts, bias=None, repeats=1):
        return experts_linear(
            x, experts, ExpertWeights(self.tensors, self.shape, bias, self.layout, self.backend), repeats
        )

    def alone(self, x, expert, bias=None):
        """One expert's own product by the operator for linears."""
        tensors = [tensor[expert] for tensor in self.tensors]
        own = None if bias is None else bias[expert]
        return binary_linear(x, tensors, self.shape, own, self.layout, self.backend)

    def inside(self, experts):
        return (experts >= 0) & (experts < self.count)

    def chosen_dense(self, experts):
        """[pairs, out, in], of a pair without an expert 0."""
        experts = experts.cpu()
        return self.dense[experts.clamp(0, self.count - 1).long()] * self.inside(experts)[:, None, None]

    def expected(self, x, experts, bias=None, repeats=1):
        rows = x.detach().cpu().double().repeat_interleave(repeats, 0)
        out = torch.einsum("si,soi->so", rows, self.chosen_dense(experts))
        if bias is not None:
            inside = self.inside(experts).cpu()
            out += bias.detach().cpu().double()[experts.cpu().clamp(0, self.count - 1).long()] * inside[:, None]
        return out


def assert_near(found, expected, dtype, times=1):
    assert found.dtype == dtype
    assert found.shape == expected.shape
    error = (found.detach().cpu().double() - expected).abs().max() / expected.abs().max()
    assert error <= times * TOLERANCE[dtype], float(error)  # NaN is not <= either


ways = pytest.mark.parametrize(("backend", "layout"), WAYS)
native = pytest.mark.parametrize("backend", ["reference", "cpu"])


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("way", "name"), [*((w, n) for w in WAYS[:2] for n in SETTINGS), (WAYS[2], "1+1")])
def test_rows_are_their_experts_dense_products(way, dtype, name):
    """The Triton kernels' own tests have the other settings."""
    stack = Experts(*way, SETTINGS[name])
    bias = stack.random(EXPERTS, ROWS, seed=2)
    for rows, repeats in ((1, 4), (3, 2), (30, 3)):
        x, experts = stack.random(rows, COLUMNS, dtype=dtype), stack.routed(rows * repeats)
        assert_near(stack(x, experts, None, repeats), stack.expected(x, experts, None, repeats), dtype)
        assert_near(stack(x, experts, bias, repeats), stack.expected(x, experts, bias, repeats), dtype, times=2)


@pytest.mark.parametrize(("backend", "layout"), TURNED)
def test_layout_of_another_backend_gives_the_same(backend, layout):
    stack = Experts(backend, layout)
    x, experts = stack.random(9, COLUMNS), stack.routed(18)
    assert_near(stack(x, experts, None, 2), stack.expected(x, experts, None, 2), torch.float32)


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_rows_equal_those_of_the_expert_alone_to_the_bit(backend, dtype, settings):
    stack = Experts(backend, "stored", settings)
    x, bias, experts = stack.random(21, COLUMNS, dtype=dtype), stack.random(EXPERTS, ROWS), stack.routed(63)
    found = stack(x, experts, bias, 3)
    if backend == "cpu":
        alone = [stack.alone(x[s // 3][None], int(e), bias)[0] for s, e in enumerate(experts)]
        assert torch.equal(found, torch.stack(alone))
    for expert in range(EXPERTS):
        pairs = (experts == expert).nonzero()[:, 0]
        assert torch.equal(found[pairs], stack.alone(x[pairs // 3], expert, bias))


@ways
@pytest.mark.parametrize("bias", [False, True])
def test_row_without_an_expert_is_zero(backend, layout, bias):
    stack = Experts(backend, layout)
    x, experts = stack.random(8, COLUMNS), stack.routed(8)
    experts[[1, 4, 6]] = torch.tensor([-1, EXPERTS, 2**31 - 1], device=stack.device)
    found = stack(x, experts, stack.random(EXPERTS, ROWS) if bias else None)
    assert not found[[1, 4, 6]].any()
    assert bool(found[[0, 2, 3, 5, 7]].any(-1).all())
    assert not stack(x, torch.full_like(experts, -1)).any()


@ways
def test_all_rows_may_go_to_one_expert(backend, layout):
    stack = Experts(backend, layout)
    x, experts = stack.random(37, COLUMNS), torch.full((37,), 4, device=stack.device)
    assert_near(stack(x, experts), stack.expected(x, experts), torch.float32)


@ways
def test_no_rows_are_empty_forward_and_backward(backend, layout):
    stack = Experts(backend, layout)
    for repeats in (1, 4):
        x, bias = stack.random(0, COLUMNS).requires_grad_(), stack.random(EXPERTS, ROWS).requires_grad_()
        out = stack(x, stack.routed(0), bias, repeats)
        assert out.shape == (0, ROWS)
        out.sum().backward()
        assert x.grad.shape == x.shape and torch.equal(bias.grad, torch.zeros_like(bias))


@ways
def test_one_expert_is_a_linear(backend, layout):
    stack = Experts(backend, layout, count=1)
    x = stack.random(5, COLUMNS)
    assert_near(stack(x, torch.zeros(5, dtype=torch.int64, device=stack.device)), x.cpu().double() @ stack.dense[0].T,
                torch.float32)  # fmt: skip


@ways
def test_order_of_pairs_changes_nothing_but_the_order(backend, layout):
    stack = Experts(backend, layout)
    x, experts = stack.random(50, COLUMNS, dtype=torch.bfloat16), stack.routed(50, low=-1)
    found, order = stack(x, experts), torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stack(x[order], experts[order]), found[order])


@ways
def test_experts_may_be_int32_or_a_view(backend, layout):
    stack = Experts(backend, layout)
    x, experts = stack.random(6, COLUMNS), stack.routed(12)
    found = stack(x, experts, None, 2)
    assert torch.equal(stack(x, experts.int(), None, 2), found)
    assert torch.equal(stack(x, torch.stack([experts, experts], 1)[:, 0], None, 2), found)


@ways
def test_inputs_and_bias_may_be_views(backend, layout):
    stack = Experts(backend, layout)
    experts, bias = stack.routed(6), stack.random(ROWS, EXPERTS).T
    for x in (stack.random(COLUMNS, 6).T, stack.random(6, 2 * COLUMNS)[:, ::2], stack.random(1, COLUMNS).expand(6, -1)):
        assert not x.is_contiguous()
        assert_near(stack(x, experts, bias), stack.expected(x, experts, bias), torch.float32)


@ways
def test_arguments_are_left_as_they_were(backend, layout):
    stack = Experts(backend, layout)
    arguments = x, experts, bias = stack.random(6, COLUMNS), stack.routed(6, low=-1), stack.random(EXPERTS, ROWS)
    before = [t.clone() for t in (*arguments, *stack.tensors)]
    stack(x, experts, bias).fill_(float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(before, (*arguments, *stack.tensors)))


@ways
def test_double_inputs_give_doubles(backend, layout):
    stack = Experts(backend, layout)
    x, experts = stack.random(6, COLUMNS, dtype=torch.float64).requires_grad_(), stack.routed(6)
    out = stack(x, experts)
    assert_near(out, stack.expected(x, experts), torch.float64)
    out.sum().backward()
    assert_near(x.grad, stack.chosen_dense(experts).sum(1), torch.float64)


@ways
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_row_that_is_not_finite_spoils_no_other(backend, layout, bad):
    stack = Experts(backend, layout)
    x, experts = stack.random(7, COLUMNS), torch.tensor([0, 0, 1, 0, 2, 1, 0], device=stack.device)
    x[1, 7] = bad
    out = stack(x, experts)
    assert not bool(out[1].isfinite().any())
    others = [0, 2, 3, 4, 5, 6]
    assert_near(out[others], stack.expected(x[others], experts[others]), torch.float32)


@native
def test_forced_backend_computes(backend):
    stack = Experts(backend)
    stack.backend = None
    x, experts = stack.random(6, COLUMNS), stack.routed(6)
    with force_backend(backend):
        assert_near(stack(x, experts), stack.expected(x, experts), torch.float32)


# -- gradients ---------------------------------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_the_dense_experts(backend, layout, dtype):
    stack = Experts(backend, layout)
    x = stack.random(10, COLUMNS, dtype=dtype).requires_grad_()
    bias = stack.random(EXPERTS, ROWS, seed=2, dtype=dtype).requires_grad_()
    experts, pull = stack.routed(30, low=-1), stack.random(30, ROWS, seed=3, dtype=dtype)
    stack(x, experts, bias, 3).backward(pull)
    pairs = torch.einsum("so,soi->si", pull.cpu().double(), stack.chosen_dense(experts))
    assert_near(x.grad, pairs.view(10, 3, COLUMNS).sum(1), dtype, times=4)  # weights are rounded to 16 bits on a GPU
    wanted = torch.stack([pull[experts == e].cpu().double().sum(0) for e in range(EXPERTS)])
    assert not wanted[EXPERTS // 2].any()  # an expert without rows
    assert_near(bias.grad, wanted, dtype)


@ways
def test_gradients_go_to_those_who_ask(backend, layout):
    stack = Experts(backend, layout)
    x, bias, experts = stack.random(4, COLUMNS), stack.random(EXPERTS, ROWS), stack.routed(4)
    assert not stack(x, experts, bias).requires_grad
    stack(x, experts, bias.requires_grad_()).sum().backward()
    assert x.grad is None and bias.grad is not None
    other = stack.random(EXPERTS, ROWS)
    stack(x.requires_grad_(), experts, other).sum().backward()
    assert other.grad is None
    assert_near(x.grad, stack.chosen_dense(experts).sum(1), torch.float32)


@ways
def test_gradients_of_a_bias_in_another_dtype_have_its_dtype(backend, layout):
    stack = Experts(backend, layout)
    bias = stack.random(EXPERTS, ROWS, dtype=torch.float16).requires_grad_()
    stack(stack.random(4, COLUMNS), torch.tensor([0, 1, 1, 1], device=stack.device), bias).sum().backward()
    assert bias.grad.dtype == torch.float16
    assert bias.grad[:, 0].tolist() == [1, 3, 0, 0, 0, 0]


def test_backward_keeps_nothing_dense():
    stack, kept = Experts("reference"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stack(stack.random(4, COLUMNS).requires_grad_(), stack.routed(8), None, 2)
    assert [(t.dtype, tuple(t.shape)) for t in kept] == [(torch.int64, (8,))]


def test_backward_makes_one_expert_dense_at_a_time(monkeypatch):
    from optimum_sab.ops import experts as module

    stack, dense = Experts("cpu"), module.cpu_dequantize
    shapes = []
    monkeypatch.setattr(module, "cpu_dequantize", lambda packed: shapes.append(dense(packed).shape) or dense(packed))
    x, experts = stack.random(9, COLUMNS).requires_grad_(), torch.tensor([5, 1, 1, 5, 5, -1, 1, 5, 7])
    stack(x, experts).sum().backward()
    assert shapes == [(ROWS, COLUMNS)] * 2  # of experts 1 and 5 and no other


# -- refusals ----------------------------------------------------------------------------------------------------------


def call(**changes):
    stack = Experts("reference")
    given = {
        "x": torch.zeros(4, COLUMNS),
        "experts": torch.zeros(8, dtype=torch.int64),
        "tensors": stack.tensors,
        "shape": stack.shape,
        "bias": torch.zeros(EXPERTS, ROWS),
        "repeats": 2,
    }
    given |= {name: make(given) for name, make in changes.items()}
    weights = ExpertWeights(given["tensors"], given["shape"], given["bias"])
    return experts_linear(given["x"], given["experts"], weights, given["repeats"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": lambda g: torch.zeros(4, 7)}, f"last dimension is 7, the layer takes {COLUMNS}"),
        ({"x": lambda g: torch.zeros(4, COLUMNS, dtype=torch.int64)}, r"torch\.int64"),
        ({"x": lambda g: torch.zeros(2, 2, COLUMNS)}, r"the input is \[2, 2, 140\].*\[rows, 140\]"),
        ({"x": lambda g: torch.zeros(5, COLUMNS)}, r"\[5, 140\] and experts are \[8\]; with repeats=2"),
        ({"x": lambda g: torch.zeros(4, COLUMNS, device="meta")}, "the input is on meta, the layer on cpu"),
        ({"experts": lambda g: torch.zeros(4, 2, dtype=torch.int64)}, r"experts are \[4, 2\]"),
        ({"experts": lambda g: torch.zeros(8)}, r"experts are torch\.float32; .* int64 or int32"),
        ({"experts": lambda g: g["experts"].to("meta")}, "experts on meta and the input on cpu"),
        ({"repeats": lambda g: 0}, "repeats=0 must be at least 1"),
        ({"repeats": lambda g: -2}, "repeats=-2 must be at least 1"),
        ({"bias": lambda g: torch.zeros(ROWS)}, r"the bias is torch\.float32 \[40\]; 6 experts take floats \[6, 40\]"),
        ({"bias": lambda g: torch.zeros(EXPERTS, ROWS, dtype=torch.int64)}, r"the bias is torch\.int64"),
        ({"bias": lambda g: torch.zeros(EXPERTS, ROWS, device="meta")}, "the bias on meta and the input on cpu"),
        ({"tensors": lambda g: g["tensors"][:-1]}, "experts have 6 tensors .*, not 5"),
        ({"tensors": lambda g: [g["tensors"][0][:3], *g["tensors"][1:]]}, "different numbers of experts: weight 3"),
        ({"tensors": lambda g: [t.to("meta") for t in g["tensors"]]}, "on meta: it was never loaded"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    call()
    with pytest.raises(ConfigError, match=message):
        call(**changes)
    with torch.no_grad(), pytest.raises(ConfigError, match=message):  # the direct way gives it to the operator
        call(**changes)


def test_unknown_backend_is_refused():
    stack = Experts("reference")
    stack.backend = "gpu"
    with pytest.raises(ConfigError, match="'gpu' is no backend"):
        stack(stack.random(3, COLUMNS), stack.routed(3))


def test_forward_mode_is_refused_rather_than_zero():
    stack = Experts("reference")
    x, experts = stack.random(3, COLUMNS), stack.routed(3)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda each: stack(each, experts), (x,), (torch.ones_like(x),))


def test_all_on_meta_has_the_shape_and_dtype():
    stack = Experts("reference")
    stack.tensors, stack.backend = [tensor.to("meta") for tensor in stack.tensors], None
    out = stack(torch.zeros(3, COLUMNS, device="meta", dtype=torch.bfloat16),
                torch.zeros(6, device="meta", dtype=torch.int64), None, 2)  # fmt: skip
    assert (out.shape, out.dtype, out.device.type) == ((6, ROWS), torch.bfloat16, "meta")


# -- as an operator ----------------------------------------------------------------------------------------------------


@native
def test_operators_pass_opcheck(backend):
    stack = Experts(backend)
    x, bias = stack.random(4, COLUMNS).requires_grad_(), stack.random(EXPERTS, ROWS).requires_grad_()
    experts, weight = stack.routed(8, low=-1), (stack.tensors, "stored", backend, stack.shape.text)
    operators = torch.ops.optimum_sab
    torch.library.opcheck(operators.experts_linear.default, (x, experts, bias, 2, *weight))
    torch.library.opcheck(operators.experts_linear.default, (x.detach(), experts, None, 2, *weight))
    torch.library.opcheck(operators.experts_linear_transposed.default, (stack.random(8, ROWS), experts, 2, *weight))


@ways
@pytest.mark.parametrize("compiler", [pytest.param("aot_eager", marks=pytest.mark.full), "inductor"])
def test_compiled_experts_are_one_graph_for_every_number_of_tokens(backend, layout, compiler):
    stack = Experts(backend, layout)
    counter = CompileCounterWithBackend(compiler)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, index, bias: stack(x * 2, index.reshape(-1), bias, 4) + 1, fullgraph=True, backend=counter
    )
    bias = stack.random(EXPERTS, ROWS)
    for tokens in (3, 5, 12):
        x, index = stack.random(tokens, COLUMNS), stack.routed(4 * tokens).view(tokens, 4)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(index, 0)
        assert_near(compiled(x, index, bias), stack.expected(2 * x, index.reshape(-1), bias, 4) + 1, torch.float32)
    assert counter.frame_count == 1


@ways
def test_compiled_gradients_are_the_eager_ones(backend, layout):
    stack = Experts(backend, layout)
    torch._dynamo.reset()
    experts = stack.routed(6, low=-1)
    compiled = torch.compile(lambda x, bias: stack(x, experts, bias, 2).sin(), fullgraph=True, backend="aot_eager")
    x, bias = stack.random(3, COLUMNS).requires_grad_(), stack.random(EXPERTS, ROWS).requires_grad_()
    compiled(x, bias).sum().backward()
    pull = stack.expected(x, experts, bias, 2).cos()
    pairs = torch.einsum("so,soi->si", pull, stack.chosen_dense(experts))
    assert_near(x.grad, pairs.view(3, 2, COLUMNS).sum(1), torch.float32, times=4)
    wanted = torch.stack([pull[experts.cpu() == e].sum(0) for e in range(EXPERTS)])
    assert_near(bias.grad, wanted, torch.float32, times=4)


@native
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_autocast_gives_its_dtype_as_for_linears(backend, dtype):
    stack = Experts(backend)
    x, experts = stack.random(4, COLUMNS, dtype=dtype).requires_grad_(), stack.routed(4)
    with torch.autocast("cpu", torch.bfloat16):
        out = stack(x, experts)
    wanted = torch.float64 if dtype == torch.float64 else torch.bfloat16
    assert_near(out, stack.expected(x.to(wanted), experts), wanted)
    out.float().sum().backward()
    assert x.grad.dtype == dtype


# -- past the dispatcher -----------------------------------------------------------------------------------------------


@pytest.fixture
def operator_calls(monkeypatch):
    """How often the operator was called."""
    calls, through = [], torch.ops.optimum_sab.experts_linear
    counting = SimpleNamespace(experts_linear=lambda *a: calls.append(1) or through(*a))
    monkeypatch.setattr("optimum_sab.ops.experts.torch.ops", SimpleNamespace(optimum_sab=counting))
    return calls


def test_values_alone_go_past_the_dispatcher(operator_calls):
    stack = Experts("cpu")
    stack.backend = None
    x, bias, experts = stack.random(4, COLUMNS), stack.random(EXPERTS, ROWS), stack.routed(8, low=-1)
    direct = stack(x, experts, bias, 2)
    assert operator_calls == []
    assert torch.equal(stack(x.requires_grad_(), experts, bias, 2), direct)
    assert operator_calls == [1]


def test_whoever_wants_more_than_values_gets_the_operator(operator_calls, monkeypatch):
    stack = Experts("cpu")
    stack.backend = None
    x, bias, experts = stack.random(4, COLUMNS), stack.random(EXPERTS, ROWS), stack.routed(8)
    expected = stack(x, experts, bias, 2)
    torch.testing.assert_close(stack(x, experts.int(), bias, 2), expected)
    torch.testing.assert_close(stack(x, experts, bias.clone().requires_grad_(), 2), expected)
    torch.testing.assert_close(stack(x, experts, bias.double(), 2), expected)
    torch.testing.assert_close(stack(x.double(), experts, bias, 2).float(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert stack(x, experts, bias, 2).dtype == torch.bfloat16
    with force_backend("reference"):
        torch.testing.assert_close(stack(x, experts, bias, 2), expected)
    monkeypatch.setenv("OPTIMUM_SAB_BACKEND", "reference")
    torch.testing.assert_close(stack(x, experts, bias, 2), expected)
    assert operator_calls == [1] * 7
