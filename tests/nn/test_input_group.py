"""Layers that share an input: one launch, the same numbers, and alone again whenever they do not share it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from optimum_sab.core.settings import LayerSettings
from optimum_sab.nn.input_group import MAX_MEMBERS, PATIENCE, SHARED, InputGroup, group_linears
from optimum_sab.nn.linear import SABLinear
from optimum_sab.ops import force_backend
from tests.nn.siblings import WIDTH, siblings

sab_kernels = pytest.importorskip("sab_kernels", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEFAULT = LayerSettings()


class Attention(nn.Module):
    """q, k and v of one input, and o of another."""

    def __init__(self, sizes=(64, 32, 8), settings=DEFAULT, bias=True):
        super().__init__()
        self.q, self.k, self.v = siblings(sizes, settings, bias=bias)
        (self.o,) = siblings([20], settings, width=sum(sizes))

    def parts(self, x):
        return [self.q(x), self.k(x), self.v(x)]

    def forward(self, x):
        return self.o(torch.cat(self.parts(x * 1.5), -1).tanh())


class Expected:
    """The same module computed with dense weights in double precision; made before layouts are touched."""

    def __init__(self, model):
        self.weights = {n: m.packed.dequantize().double().cpu() for n, m in linears(model).items()}
        self.biases = {n: 0 if m.bias is None else m.bias.detach().double().cpu() for n, m in linears(model).items()}

    def linear(self, name, x):
        return x.double().cpu() @ self.weights[name].T + self.biases[name]

    def parts(self, x):
        return [self.linear(name, x) for name in "qkv"]

    def __call__(self, x):
        return self.linear("o", torch.cat(self.parts(x * 1.5), -1).tanh())


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, SABLinear)}


def prepare(model):
    """As the quantizer does after loading."""
    model.to(DEVICE)
    for layer in linears(model).values():
        layer.prepare()
    return group_linears(model)


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_near(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach().cpu().double(), other, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def triton():
    with force_backend("triton"):
        yield


@pytest.fixture
def launches(monkeypatch):
    """Layer sizes of every launch, in order. Single layers launch as ``(rows,)``."""
    seen = []
    stacked, single = sab_kernels.stacked_linear, sab_kernels.binary_linear

    def count_stacked(x, tensors, geometry, sizes, *rest):
        seen.append(tuple(sizes))
        return stacked(x, tensors, geometry, sizes, *rest)

    def count_single(x, tensors, geometry, *rest):
        seen.append((geometry.rows,))
        return single(x, tensors, geometry, *rest)

    monkeypatch.setattr(sab_kernels, "stacked_linear", count_stacked)
    monkeypatch.setattr(sab_kernels, "binary_linear", count_single)
    return seen


TOGETHER = (64, 32, 8)
ALONE = [(64,), (32,), (8,)]


@pytest.fixture
def attention():
    """(model, what it should compute, its group of q, k, v)."""
    model = Attention()
    expected = Expected(model)
    (group,) = prepare(model)
    return model, expected, group


# -- who is grouped ----------------------------------------------------------------------------------------------------


def test_siblings_with_one_input_are_grouped_and_others_are_not(attention):
    model, _, group = attention
    assert group.members == (model.q, model.k, model.v)
    assert model.q.group is model.k.group is model.v.group is group
    assert model.o.group is None


def test_layers_of_different_parents_are_not_grouped():
    q, k = siblings([32, 32])
    assert prepare(nn.ModuleList([nn.Sequential(q), nn.Sequential(k)])) == []


@pytest.mark.parametrize("name", SHARED)
def test_siblings_with_other_columns_are_not_grouped(name):
    q, k, v = siblings([32, 32, 32])
    shared = getattr(k, name)
    shared.data = shared.data.clone()
    if name == "col_scale":
        shared.data[5] += 1
    else:  # another ascending choice of salient columns in the first block
        shared.data[:16] = torch.tensor([c for c in range(128) if c not in shared.data[:16].tolist()][:16])
    k.packed.validate()
    (group,) = prepare(nn.ModuleList([q, k, v]))
    assert group.members == (q, v)
    assert k.group is None


def test_siblings_that_differ_in_anything_else_are_not_grouped():
    others = {
        "width": siblings([32], width=WIDTH + 32)[0],
        "planes": siblings([32], LayerSettings(base_planes=2))[0],
        "scale": siblings([32], LayerSettings(row_scale="fp16"))[0],
        "bias": siblings([32], bias=False)[0],
        "backend": siblings([32])[0],
        "meta": siblings([32])[0].to("meta"),
    }
    others["backend"].backend = "reference"
    model = nn.ModuleDict({"first": siblings([32])[0], **others})
    for layer in linears(model).values():
        layer.prepare()
    assert group_linears(model) == []


@pytest.mark.parametrize(
    ("sizes", "grouped"), [((32, 40), True), ((40, 32), False), ((32, 33, 32), False), ((5, 64), False)]
)
def test_members_before_the_last_need_whole_tiles_of_rows(sizes, grouped, launches):
    layers = siblings(sizes)
    model = nn.ModuleList(layers)
    dense = [layer.packed.dequantize().double() for layer in layers]
    assert bool(prepare(model)) == grouped
    x = inputs(3, WIDTH)
    expected = [x.cpu().double() @ w.T + layer.bias.cpu().double() for w, layer in zip(dense, layers)]
    assert_near([layer(x) for layer in layers], expected)
    assert launches == ([sizes] if grouped else [(size,) for size in sizes])


@pytest.mark.parametrize(("count", "groups"), [(4, [4]), (5, [4]), (6, [4, 2]), (9, [4, 4])])
def test_more_siblings_than_a_launch_takes_make_several_groups(count, groups, launches):
    layers = siblings([32] * count)
    found = prepare(nn.ModuleList(layers))
    assert [len(group.members) for group in found] == groups
    assert MAX_MEMBERS == 4
    x = inputs(2, WIDTH)
    dense = [layer.packed.dequantize().cpu().double() for layer in layers]
    expected = [x.cpu().double() @ w.T + layer.bias.cpu().double() for w, layer in zip(dense, layers)]
    assert_near([layer(x) for layer in layers], expected)
    assert [len(sizes) for sizes in launches] == groups + [1] * (count - sum(groups))


def test_grouping_again_replaces_the_groups(attention, launches):
    model, expected, old = attention
    model(inputs(2, WIDTH))
    (new,) = group_linears(model)
    assert new is not old and model.q.group is new
    launches.clear()
    x = inputs(2, WIDTH)
    assert_near(model.parts(x), expected.parts(x))
    assert launches == [TOGETHER]


def test_groups_where_triton_does_not_compute_stay_idle(launches):
    model = Attention()
    expected, x = Expected(model), torch.randn(3, WIDTH)
    with force_backend("reference"):
        for layer in linears(model).values():
            layer.prepare()
        (group,) = group_linears(model)
        for _ in range(2):
            assert_near([model(x)], [expected(x)])
    assert launches == []
    assert not group.proven
    assert model.q.layout == "stored"


def test_group_computes_with_another_backend_where_that_is_forced(attention, launches):
    model, expected, _ = attention
    x = inputs(3, WIDTH)
    model(x)
    launches.clear()
    with force_backend("reference"):
        assert_near([model(x), model(x)], [expected(x)] * 2)
    assert launches == []
    assert_near([model(x)], [expected(x)])
    assert TOGETHER in launches


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [DEFAULT, LayerSettings(block_size=64, base_planes=2, row_scale="fp16"), LayerSettings(residual_planes=0)],
    ids=["1+1", "2+1 fp16", "1+0"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_group_computes_what_its_members_would_in_one_launch(settings, bias, launches):
    model = Attention(settings=settings, bias=bias)
    expected = Expected(model)
    (group,) = prepare(model)
    for tokens in (1, 20):
        x = inputs(tokens, WIDTH)
        assert_near(model.parts(x), expected.parts(x))
    assert launches == [TOGETHER, TOGETHER]
    assert group.proven


def test_group_of_two_as_gate_and_up(launches):
    gate, up = siblings([96, 96])
    x = inputs(2, 3, WIDTH)
    expected = [x.cpu().double() @ m.packed.dequantize().double().T + m.bias.double() for m in (gate, up)]
    prepare(nn.ModuleDict({"gate": gate, "up": up}))
    assert_near([gate(x), up(x)], expected)
    assert launches == [(96, 96)]


def test_group_serves_calls_in_any_order(attention, launches):
    model, expected, _ = attention
    x = inputs(3, WIDTH)
    q, k, v = expected.parts(x)
    assert_near([model.v(x), model.k(x), model.q(x)], [v, k, q])
    assert_near([model.k(x), model.v(x)], [k, v])  # what the call of q left
    assert launches == [(8,), (32,), TOGETHER]


def test_member_called_with_another_tensor_computes_alone(attention, launches):
    model, expected, group = attention
    x, y = inputs(3, WIDTH), inputs(3, WIDTH, seed=2)
    assert_near(
        [model.q(x), model.k(y), model.v(x)], [expected.parts(x)[0], expected.parts(y)[1], expected.parts(x)[2]]
    )
    assert launches == [TOGETHER, (32,)]
    assert not group.proven
    equal = x.clone()  # the same values are not the same tensor
    assert_near([model.q(x), model.k(equal), model.v(equal)], expected.parts(x))
    assert launches[2:] == [TOGETHER, (32,), (8,)]


def test_first_member_called_alone_again_and_again_is_right(attention):
    model, expected, group = attention
    for seed in range(3):
        x = inputs(2, WIDTH, seed=seed)
        assert_near([model.q(x)], [expected.parts(x)[0]])
    assert not group.proven


def test_member_called_twice_gives_two_tensors(attention):
    model, expected, _ = attention
    x = inputs(3, WIDTH)
    model.q(x)
    first = model.k(x)
    first.zero_()
    assert_near([model.k(x)], [expected.parts(x)[1]])


def test_outputs_of_members_can_be_changed_in_place(attention):
    model, expected, _ = attention
    for tokens in (1, 4):
        x = inputs(tokens, WIDTH)
        q = model.q(x).fill_(float("nan"))
        k = model.k(x)
        k.add_(1)
        assert_near([k - 1, model.v(x)], expected.parts(x)[1:])
        assert bool(q.isnan().all())


def test_input_changed_in_place_between_calls_dissolves_the_group(attention, launches):
    model, expected, group = attention
    x = inputs(3, WIDTH)
    before = expected.parts(x)
    q = model.q(x)
    x.mul_(-2)
    after = expected.parts(x)
    assert_near([q, model.k(x), model.v(x)], [before[0], *after[1:]])
    assert launches == [TOGETHER, (32,), (8,)]
    assert not any(member.group for member in group.members)
    assert_near(model.parts(x), after)
    assert launches[3:] == ALONE


def test_input_changed_in_place_between_whole_calls_is_computed_anew(attention, launches):
    model, expected, group = attention
    x = inputs(3, WIDTH)
    for _ in range(3):
        assert_near(model.parts(x), expected.parts(x))
        x.mul_(-2)
    assert launches == [TOGETHER] * 3
    assert group.proven


def test_group_without_tokens(attention):
    model, _, _ = attention
    assert [tuple(part.shape) for part in model.parts(inputs(2, 0, WIDTH))] == [(2, 0, 64), (2, 0, 32), (2, 0, 8)]


def test_group_survives_a_refused_input(attention, launches):
    model, expected, _ = attention
    with pytest.raises(ValueError, match="last dimension is 7"):
        model.q(inputs(2, 7))
    x = inputs(2, WIDTH)
    assert_near(model.parts(x), expected.parts(x))
    assert launches == [TOGETHER]


def test_group_holds_nothing_once_the_last_member_was_called(attention):
    model, _, group = attention
    model(inputs(2, WIDTH))
    assert group._pending is None


# -- modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_group_works_in_every_mode(attention, launches, mode):
    model, expected, group = attention
    x = inputs(3, WIDTH)
    with mode():
        assert_near([model(x), model(x)], [expected(x)] * 2)
    assert launches.count(TOGETHER) == 2
    assert group.proven
    assert_near([model(x)], [expected(x)])


def test_group_under_autocast_has_autocast_s_dtype(attention):
    model, expected, _ = attention
    x = inputs(3, WIDTH)
    with torch.autocast(DEVICE, torch.float16):
        assert {part.dtype for part in model.parts(x)} == {torch.float16}
        assert_near(model.parts(x), expected.parts(x), 2.0**-7)


def test_gradients_through_a_group_are_the_dense_ones(attention, launches):
    model, expected, _ = attention
    x = inputs(2, WIDTH).requires_grad_()
    model(x).square().sum().backward()
    assert launches.count(TOGETHER) == 1
    y = x.detach().double().cpu().requires_grad_()
    expected(y).square().sum().backward()
    assert_near([x.grad], [y.grad], 1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("used", ["q", "k", "v"])
def test_gradients_of_one_member_are_its_own(attention, used):
    model, expected, _ = attention
    x = inputs(2, WIDTH).requires_grad_()
    parts = dict(zip("qkv", model.parts(x)))
    parts[used].sum().backward()
    assert_near([x.grad], [expected.weights[used].sum(0).expand(2, -1)])


def test_gradients_reach_biases_that_ask_for_them(attention):
    model, _, _ = attention
    for layer in (model.q, model.k, model.v):
        layer.bias.requires_grad_()
    x = inputs(2, WIDTH)
    sum(part.sum() for part in model.parts(x)).backward()
    for layer in (model.q, model.k, model.v):
        torch.testing.assert_close(layer.bias.grad, torch.full_like(layer.bias, 2.0))


def test_bias_changed_in_place_is_seen(attention):
    model, expected, _ = attention
    x = inputs(2, WIDTH)
    model.parts(x)
    with torch.no_grad():
        model.k.bias.add_(1.0)
    expected.biases["k"] = expected.biases["k"] + 1
    assert_near(model.parts(x), expected.parts(x))


def test_bias_that_was_replaced_is_seen(attention):
    model, expected, _ = attention
    x = inputs(2, WIDTH)
    model.parts(x)
    model.v.bias = nn.Parameter(torch.zeros_like(model.v.bias))
    expected.biases["v"] = torch.zeros(8)
    assert_near(model.parts(x), expected.parts(x))


def test_member_called_with_gradients_after_the_first_without_has_its_gradient(attention):
    model, expected, _ = attention
    x = inputs(2, WIDTH).requires_grad_()
    with torch.no_grad():
        model.q(x)
    model.k(x).sum().backward()
    assert_near([x.grad], [expected.weights["k"].sum(0).expand(2, -1)])


def test_member_called_outside_autocast_after_the_first_inside_has_its_own_dtype(attention):
    model, expected, _ = attention
    x = inputs(2, WIDTH)
    with torch.autocast(DEVICE, torch.float16):
        model.q(x)
    k = model.k(x)
    assert k.dtype == torch.float32
    assert_near([k], [expected.parts(x)[1]])


def test_gradients_of_members_pulled_between_the_calls(attention):
    model, expected, _ = attention
    x = inputs(2, WIDTH).requires_grad_()
    for layer in (model.q, model.k, model.v):
        layer(x).sum().backward()
    assert_near([x.grad], [sum(expected.weights[n].sum(0) for n in "qkv").expand(2, -1)])


def test_gradients_under_checkpointing_are_the_same(attention):
    model, expected, _ = attention
    x = inputs(2, WIDTH).requires_grad_()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum().backward()
    y = x.detach().double().cpu().requires_grad_()
    expected(y).square().sum().backward()
    assert_near([x.grad], [y.grad], 1e-4)


# -- compiled ----------------------------------------------------------------------------------------------------------


# what aot_eager does, inductor does first
@pytest.mark.parametrize("backend", [pytest.param("aot_eager", marks=pytest.mark.full), "inductor"])
def test_compiled_model_uses_the_group_once_it_is_proven(attention, launches, backend):
    model, expected, group = attention
    x = inputs(3, WIDTH)
    for proven, launched in ((False, ALONE), (True, [TOGETHER])):
        assert group.proven == proven
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        launches.clear()
        assert_near([compiled(x), compiled(x)], [expected(x)] * 2, 1e-4)
        assert sorted(launches) == sorted([*launched, (20,)] * 2)  # Inductor may change the order
        model(x)
    assert group._pending is None


def test_compiled_model_and_the_same_model_called_eagerly_do_not_disturb_each_other(attention, launches):
    model, expected, _ = attention
    model(inputs(2, WIDTH))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = inputs(3, WIDTH, seed=seed)
        assert_near([compiled(x), model(x)], [expected(x)] * 2, 1e-4)
    assert launches.count(TOGETHER) == 7


def test_compiled_model_with_dynamic_tokens_is_one_graph(attention):
    model, expected, _ = attention
    model(inputs(2, WIDTH))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for tokens in (3, 5, 9):
        x = inputs(tokens, WIDTH)
        torch._dynamo.mark_dynamic(x, 0)
        assert_near([compiled(x)], [expected(x)], 1e-4)
    assert counter.frame_count == 1


def test_compiled_gradients_through_a_proven_group(attention, launches):
    model, expected, _ = attention
    x = inputs(2, WIDTH)
    model(x)
    torch._dynamo.reset()
    launches.clear()
    x.requires_grad_()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    assert launches == [TOGETHER, (20,)]
    y = x.detach().double().cpu().requires_grad_()
    expected(y).square().sum().backward()
    assert_near([x.grad], [y.grad], 1e-4)


# -- the model is moved, copied, loaded --------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True], ids=["never called", "called"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_have_groups_of_their_own(attention, launches, duplicate, warm):
    model, expected, group = attention
    x = inputs(2, WIDTH)
    if warm:
        model(x)
    twin = duplicate(model)
    assert twin.q.group is twin.v.group
    assert twin.q.group is not group
    assert twin.q.group.members == (twin.q, twin.k, twin.v)
    assert not twin.q.group._stack  # copied beside the members' own tensors it would hold every layer twice
    with torch.no_grad():
        for layer in linears(model).values():
            layer.weight.zero_()
    launches.clear()
    assert_near([twin(x)], [expected(x)])
    assert launches == [TOGETHER, (20,)]


def test_copy_between_two_members_calls_has_nothing_pending(attention):
    model, expected, _ = attention
    x = inputs(2, WIDTH)
    model.q(x)
    twin = copy.deepcopy(model)
    assert_near(twin.parts(x), expected.parts(x))


def test_saved_model_is_not_larger_for_being_grouped(attention):
    model, _, _ = attention

    def size():
        buffer = io.BytesIO()
        torch.save(model, buffer)
        return buffer.tell()

    before = size()
    model(inputs(2, WIDTH))
    assert size() < 1.1 * before


@pytest.mark.parametrize(
    "move", [lambda m: m.half(), lambda m: m.double().half(), lambda m: m.to(DEVICE, torch.float16)]
)
def test_moved_model_stacks_anew(attention, launches, move):
    model, expected, _ = attention
    model(inputs(2, WIDTH))
    move(model)
    launches.clear()
    x = inputs(2, WIDTH).half()
    assert_near(model.parts(x), expected.parts(x), 2.0**-7)
    assert launches == [TOGETHER]


def test_model_brought_back_to_the_stored_layout_computes_alone(attention, launches):
    model, expected, _ = attention
    x = inputs(2, WIDTH)
    model(x)
    launches.clear()
    for layer in linears(model).values():
        layer.to_layout("stored")
    with force_backend("reference"):
        assert_near([model(x)], [expected(x)])
    assert launches == []


def test_member_alone_in_the_stored_layout_stops_the_group(attention):
    model, expected, _ = attention
    x = inputs(2, WIDTH)
    for name in "qkv":
        model(x)
        getattr(model, name).to_layout("stored")
        assert_near(model.parts(x), expected.parts(x))
        getattr(model, name).to_layout("kernel")


def test_state_dict_of_a_grouped_model_is_that_of_the_stored_tensors(launches):
    model = Attention()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare(model)
    model(inputs(2, WIDTH))
    assert TOGETHER in launches
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].cpu(), tensor), name


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_into_a_grouped_model(attention, launches, assign):
    model, _, _ = attention
    other = Attention()
    with torch.no_grad():
        for layer in (other.q, other.k, other.v):
            layer.row_exponent += 1  # other weights with the same columns
            layer.bias *= 3
    expected = Expected(other)
    x = inputs(2, WIDTH)
    model(x)
    launches.clear()
    model.load_state_dict({name: t.to(DEVICE) for name, t in other.state_dict().items()}, assign=assign)
    assert_near(model.parts(x), expected.parts(x))
    assert launches == [TOGETHER]


def test_load_state_dict_with_other_columns_into_a_grouped_model(attention):
    """The group was made for equal column scales; the new ones differ between its members."""
    model, _, _ = attention
    x = inputs(2, WIDTH)
    model(x)
    other = Attention()
    with torch.no_grad():
        other.k.col_scale[:] = other.k.col_scale.flip(0)
    model.load_state_dict({name: t.to(DEVICE) for name, t in other.state_dict().items()})
    assert_near(model.parts(x), Expected(other).parts(x))


def test_member_that_is_dequantized_leaves_the_others_right(attention):
    model, expected, _ = attention
    x = inputs(2, WIDTH)
    model(x)
    model.k = model.k.dequantize().to(DEVICE)
    assert_near(model.parts(x), expected.parts(x))


def test_stacked_tensors_are_those_of_the_members(attention):
    """No layer is held twice: the members' tensors are views of the stack."""
    model, _, group = attention
    model(inputs(2, WIDTH))
    for name in group.shape.names:
        if name not in SHARED:
            storages = {m._parameters[name].untyped_storage().data_ptr() for m in group.members}
            assert len(storages) == 1, name
            (size,) = {m._parameters[name].untyped_storage().nbytes() for m in group.members}
            assert size == sum(m._parameters[name].nbytes for m in group.members)
    assert not any(p.requires_grad for p in model.parameters())


def test_weight_that_was_replaced_is_stacked_anew(attention, launches):
    """As loaders and offloading put tensors in place, past the module's own methods."""
    model, _, _ = attention
    x = inputs(2, WIDTH)
    before = model.parts(x)
    model.k.weight = nn.Parameter(~model.k.weight, requires_grad=False)
    launches.clear()
    q, k, v = model.parts(x)
    assert launches == [TOGETHER]
    model.k.group = None
    torch.testing.assert_close(k, model.k(x))
    assert (k - before[1]).abs().max() > 0.1
    assert torch.equal(q, before[0]) and torch.equal(v, before[2])


def test_group_refuses_a_layer_that_is_no_member(attention):
    model, _, group = attention
    assert isinstance(group, InputGroup)
    with pytest.raises(ValueError, match="no member of its group"):
        group.output_of(model.o, inputs(2, WIDTH))


def test_model_compiled_right_after_loading_uses_what_was_loaded(attention):
    """The stack of before is not the weights any more, and tracing cannot look at addresses."""
    model, _, group = attention
    x = inputs(2, WIDTH)
    model(x)
    assert group.proven
    other = Attention()
    with torch.no_grad():
        for layer in linears(other).values():
            layer.row_exponent += 1
    model.load_state_dict({name: t.to(DEVICE) for name, t in other.state_dict().items()})
    assert not group.proven
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_near([compiled(x)], [Expected(other)(x)])


def test_model_compiled_right_after_copying_computes(attention):
    model, expected, _ = attention
    x = inputs(2, WIDTH)
    model(x)
    torch._dynamo.reset()
    copied = copy.deepcopy(model)
    assert_near([torch.compile(copied, fullgraph=True, backend="aot_eager")(x)], [expected(x)])


def test_group_whose_other_members_are_never_called_is_given_up(attention, launches):
    model, expected, _ = attention
    for n in range(PATIENCE + 2):
        x = inputs(2, WIDTH, seed=n) if n else inputs(2, WIDTH)
        assert_near([model.q(x)], [expected.linear("q", x)])
    assert model.q.group is None
    assert len(launches) == PATIENCE + 2
    assert launches.count(TOGETHER) == PATIENCE
    x = inputs(2, WIDTH)
    assert_near(model.parts(x), expected.parts(x))
