"""Layers that share their input on the CPU: one launch from their own tensors, and each alone whenever they do not."""

import copy
import threading

import pytest
import torch
from torch import nn

from optimum_sab.core.settings import LayerSettings
from optimum_sab.nn import input_group
from optimum_sab.nn.input_group import PATIENCE, group_linears
from optimum_sab.nn.linear import SABLinear
from optimum_sab.ops.cpu import compiler
from tests.nn.siblings import WIDTH, siblings

pytestmark = pytest.mark.skipif(not compiler.availability().usable, reason="needs a C compiler")
SIZES, DEFAULT, CODED = (64, 32, 8), LayerSettings(), LayerSettings(code="trellis16")


class Attention(nn.Module):
    def __init__(self, sizes=SIZES, settings=DEFAULT, bias=True):
        super().__init__()
        self.q, self.k, self.v = siblings(sizes, settings, bias=bias)

    def forward(self, x):
        return [self.q(x), self.k(x), self.v(x)]


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    monkeypatch.delenv("OPTIMUM_SAB_BACKEND", raising=False)


@pytest.fixture
def launches(monkeypatch):
    """How many layers every launch had; layers that compute alone are counted as 1."""
    seen = []
    together, alone = input_group.direct_linears, type(siblings([8])[0].direct).__call__

    def count_together(x, linears, *rest):
        outputs = together(x, linears, *rest)
        if outputs is not None:
            seen.append(len(linears))
        return outputs

    def count_alone(self, *arguments):
        output = alone(self, *arguments)
        if output is not None:
            seen.append(1)
        return output

    monkeypatch.setattr(input_group, "direct_linears", count_together)
    monkeypatch.setattr(type(siblings([8])[0].direct), "__call__", count_alone)
    return seen


def inputs(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def alone(model, x):
    """What the layers compute that know of no others."""
    apart = copy.deepcopy(model)
    for layer in (apart.q, apart.k, apart.v):
        layer.group = None
    return apart(x)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.fixture(params=[DEFAULT, CODED], ids=["plain", "coded"])
def model(request):
    model = Attention(settings=request.param)
    (group,) = group_linears(model)
    assert model.q.group is group
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        LayerSettings(),
        LayerSettings(block_size=64, base_planes=2, row_scale="fp16"),
        LayerSettings(residual_planes=0),
        CODED,
        CODED.replace(base_planes=2, row_scale="fp16"),
    ],
    ids=["1+1", "2+1 fp16", "1+0", "coded 1+1", "coded 2+1 fp16"],
)
def test_group_computes_the_bits_of_its_members_in_one_launch(launches, settings, bias, dtype):
    model = Attention(settings=settings, bias=bias)
    if bias:
        model.to(dtype)
    expected = [alone(model, inputs(*shape, WIDTH, dtype=dtype)) for shape in [(1, 1), (3,), (2, 9)]]
    group_linears(model)
    launches.clear()
    for shape, each in zip([(1, 1), (3,), (2, 9)], expected):
        assert_same(model(inputs(*shape, WIDTH, dtype=dtype)), each)
    assert launches == [3, 3, 3]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_group_works_in_every_mode(model, launches, context):
    expected = alone(model, inputs(1, WIDTH))
    launches.clear()
    with context():
        x = inputs(1, WIDTH)
        assert_same(model(x), expected)
    assert launches == [3]


def test_gradients_through_members_are_their_own(model, launches):
    x = inputs(2, WIDTH).requires_grad_()
    sum(part.sum() for part in model(x)).backward()
    dense = sum(layer.packed.dequantize().sum(0) for layer in (model.q, model.k, model.v))
    torch.testing.assert_close(x.grad, dense.expand(2, -1))
    assert launches == []


def test_member_called_with_another_tensor_computes_alone(model, launches):
    x, y = inputs(3, WIDTH), inputs(3, WIDTH, seed=2)
    (q, _, v), (_, k, _) = alone(model, x), alone(model, y)
    launches.clear()
    assert_same([model.q(x), model.k(y), model.v(x)], [q, k, v])
    assert launches == [3, 1]


def test_input_changed_in_place_between_the_calls_is_seen(model):
    x = inputs(3, WIDTH)
    before = alone(model, x)
    q = model.q(x)
    x.mul_(-2)
    after = alone(model, x)
    assert_same([q, model.k(x), model.v(x)], [before[0], *after[1:]])


@pytest.mark.parametrize("name", ["col_scale", "residual_index"])
def test_columns_that_are_no_longer_the_same_are_not_shared(model, launches, name):
    """However they changed: C compares them in every launch."""
    x = inputs(1, WIDTH)
    model(x)
    tensor = getattr(model.k, name)
    if name == "col_scale":
        tensor.data[:] = tensor.data.flip(0)
    else:
        tensor.data[:3] = tensor.data[:3] + 1
    expected = alone(model, x)
    launches.clear()
    assert_same(model(x), expected)
    assert launches == [3]


def test_weights_that_were_replaced_or_loaded_are_computed_with(model):
    x, other = inputs(1, WIDTH), Attention(settings=model.q.settings)
    with torch.no_grad():
        for layer in (other.q, other.k, other.v):
            layer.weight.copy_(~layer.weight)
    for assign in (False, True):
        model(x)
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        assert_same(model(x), alone(other, x))
    model.k.weight = nn.Parameter(~model.k.weight, requires_grad=False)
    assert_same(model(x), alone(model, x))


def test_group_whose_other_members_are_never_called_is_given_up(model, launches):
    for n in range(PATIENCE + 2):
        model.q(inputs(2, WIDTH, seed=n))
    assert launches == [3] * PATIENCE + [1, 1]
    assert model.q.group is None


def test_a_model_in_two_threads_computes_rightly(model):
    work = [inputs(tokens, WIDTH, seed=tokens) for tokens in (1, 2, 3, 5)]
    expected = [alone(model, x) for x in work]
    wrong = []

    def compute(number):
        for _ in range(200):
            found = model(work[number])
            wrong.extend(number for a, b in zip(found, expected[number]) if not torch.equal(a, b))

    callers = [threading.Thread(target=compute, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_compiled_model_computes_after_the_group_worked(model):
    x = inputs(3, WIDTH)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), expected)


def test_copies_have_groups_of_their_own(model):
    x = inputs(1, WIDTH)
    expected = model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, SABLinear):
                layer.weight.zero_()
    assert twin.q.group is twin.v.group is not model.q.group
    assert_same(twin(x), expected)


@pytest.mark.parametrize("change", [lambda m, s: m.load_state_dict(s), lambda m, s: m.half()])
def test_what_was_computed_before_the_model_changed_is_not_taken(model, change):
    other = Attention().state_dict()
    other["k.row_exponent"] += 1
    x = inputs(1, WIDTH)
    model.q(x)
    change(model, other)
    k = model.k(x)
    model.k.group = None
    assert torch.equal(k, model.k(x))
    assert k.dtype == x.dtype
