"""Experts as linears in the place of fused ones: any layout, dense and packed."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.random_weight import random_packed
from optimum_sab.nn.experts import SABExperts
from optimum_sab.nn.fused_experts import fused_layout
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.preparation import prepare_layers
from tests.nn.fused import EXPERTS, HIDDEN, INNER, LAYOUTS, fused, given

pytestmark = pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="experts are no one module")

every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def packed(own, settings=lambda expert: LayerSettings(), seed=0):
    """The module with packed experts of random content."""
    found = SABExperts.unfused(own, fused_layout(own))
    for index, expert in enumerate(found.experts()):
        for name, dense in list(expert.named_children()):
            weight = random_packed(dense.out_features, dense.in_features, settings(index), seed=seed + index)
            setattr(expert, name, SABLinear.from_packed(weight, dense.bias))
    return found


def dequantized(experts):
    return copy.deepcopy(experts).dequantize(torch.float32)


@every_layout
def test_linears_give_what_the_module_gives(layout):
    own = fused(layout)
    wanted = own(*given(own))
    found = SABExperts.unfused(own, fused_layout(own))
    assert [name for name, each in found.named_modules() if isinstance(each, nn.Linear)][:2] == [
        f"0.{name}" for name in found.layout.matrices
    ]
    torch.testing.assert_close(found(*given(own)), wanted, rtol=1e-4, atol=1e-5)


@every_layout
def test_weights_are_views_and_come_back(layout):
    own = fused(layout)
    parameters = {name: parameter.detach().clone() for name, parameter in own.named_parameters()}
    addresses = {parameter.untyped_storage().data_ptr() for parameter in own.parameters()}
    inputs = given(own)
    wanted = own(*inputs)
    found = SABExperts.unfused(own, fused_layout(own))
    linears = [each for each in found.modules() if isinstance(each, nn.Linear)]
    assert {each.weight.untyped_storage().data_ptr() for each in linears} <= addresses
    assert {tuple(each.weight.shape) for each in linears} <= {(2 * INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)}
    again = found.dequantize()
    assert again is own
    assert {
        name: torch.equal(parameter, parameters[name]) for name, parameter in again.named_parameters()
    } == dict.fromkeys(parameters, True)
    torch.testing.assert_close(again(*inputs), wanted, rtol=0, atol=0)


@every_layout
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", None])
def test_packed_experts_compute_what_their_weights_say(layout, implementation):
    own = fused(layout)
    found = packed(own)
    if hasattr(own, "config"):
        own.config._experts_implementation = implementation
    prepare_layers(found)
    wanted = dequantized(found)
    if hasattr(wanted, "config"):
        wanted.config._experts_implementation = "eager"
    for tokens in (1, 7):
        inputs = given(own, tokens)
        torch.testing.assert_close(found(*inputs), wanted(*inputs), rtol=1e-4, atol=1e-4)


def test_experts_with_other_settings_are_stacked_apart():
    own = fused("plain", "grouped_mm")
    found = packed(own, lambda expert: LayerSettings(base_planes=1 + expert % 2, residual_planes=expert % 2))
    prepare_layers(found)
    wanted = dequantized(found)
    torch.testing.assert_close(found(*given(own, 40)), wanted(*given(own, 40)), rtol=1e-4, atol=1e-4)


def test_an_expert_that_stays_dense():
    own = fused("plain", "grouped_mm")
    found = packed(own)
    found[2].down_proj = found[2].down_proj.dequantize()
    prepare_layers(found)
    wanted = dequantized(found)
    torch.testing.assert_close(found(*given(own, 40)), wanted(*given(own, 40)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chosen", [[[0, 0]], [[4, 4]], [[EXPERTS, EXPERTS]], [[EXPERTS, 1]]])
def test_all_at_one_expert_and_none_at_any(chosen):
    own = fused("plain", "grouped_mm")
    found = packed(own)
    prepare_layers(found)
    hidden, weights, chosen = torch.randn(3, HIDDEN), torch.rand(3, 2), torch.tensor(chosen).repeat(3, 1)
    wanted = dequantized(found)
    wanted.config._experts_implementation = "eager"
    torch.testing.assert_close(found(hidden, chosen, weights), wanted(hidden, chosen, weights), rtol=1e-4, atol=1e-4)


def test_no_token():
    own = fused("plain", "grouped_mm")
    found = packed(own)
    prepare_layers(found)
    assert found(torch.zeros(0, HIDDEN), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)).shape == (0, HIDDEN)


def test_a_linear_that_becomes_another_is_noticed():
    own = fused("plain", "grouped_mm")
    found = packed(own)
    prepare_layers(found)
    before = found(*given(own, 40))
    found[1].down_proj = SABLinear.from_packed(random_packed(HIDDEN, INNER, LayerSettings(), seed=9))
    after = found(*given(own, 40))
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, dequantized(found)(*given(own, 40)), rtol=1e-4, atol=1e-4)


def test_tensors_that_are_loaded_or_copied_are_noticed():
    own = fused("plain", "grouped_mm")
    one, other = packed(own), packed(fused("plain", "grouped_mm"), seed=1)
    prepare_layers(one)
    prepare_layers(other)
    inputs = given(own, 40)
    wanted = other(*inputs)
    copied = copy.deepcopy(one)
    before = one(*inputs)
    one.load_state_dict(other.state_dict())
    torch.testing.assert_close(one(*inputs), wanted, rtol=0, atol=0)
    torch.testing.assert_close(copied(*inputs), before, rtol=0, atol=0)


def test_packed_memory_is_held_once():
    found = packed(fused("plain", "grouped_mm"))
    prepare_layers(found)
    found(*given(found.own, 40))
    stored = {(p.untyped_storage().data_ptr(), p.untyped_storage().nbytes()) for p in found.parameters()}
    assert sum(size for _, size in stored) == sum(p.numel() * p.element_size() for p in found.parameters())


def test_bits_are_those_of_the_stored_bytes():
    found = packed(fused("interleaved, transposed, biased"))
    weights = EXPERTS * (2 * INNER * HIDDEN + HIDDEN * INNER)
    stored = sum(p.numel() * p.element_size() for p in found.parameters())
    assert found.bits_per_weight == pytest.approx(8 * stored / weights)


def test_gradients_reach_the_hidden_states():
    own = fused("plain", "grouped_mm")
    found = packed(own)
    prepare_layers(found)
    hidden, chosen, weights = given(own)
    wanted = dequantized(found)
    gradients = []
    for module in (found, wanted):
        leaf = hidden.clone().requires_grad_()
        module(leaf, chosen, weights).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


class _Scaled(nn.Module):
    """Looks like fused experts and does more."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, HIDDEN, 2 * INNER))
        self.down_proj = nn.Parameter(torch.randn(3, INNER, HIDDEN))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states):
        hidden = hidden_states.view(3, -1, HIDDEN)
        gate, up = torch.bmm(hidden, self.gate_up_proj).chunk(2, -1)
        return torch.bmm(self.act_fn(gate) * up, self.down_proj).view_as(hidden_states) * 1.5


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(HIDDEN, HIDDEN)
        self.experts = _Scaled()


def test_experts_that_compute_something_else_stay_as_they_are():
    from optimum_sab.errors import SABWarning
    from optimum_sab.nn.unfusing import unfuse_experts

    model = nn.Sequential(nn.ModuleList([_Block(), _Block()]))
    with pytest.warns(SABWarning, match="_Scaled.*stay dense"):
        assert unfuse_experts(model) == []
    assert type(model[0][1].experts) is _Scaled and model[0][1].experts.gate_up_proj.shape == (3, HIDDEN, 2 * INNER)


@pytest.mark.parametrize("kind", ["a parameter", "a module", "tied when loaded"])
def test_experts_whose_weights_stand_in_another_place_too_are_left_alone(kind):
    """What they are given in one place says nothing of the other; the third block's are its own."""
    from optimum_sab.nn.unfusing import fused_experts

    model = nn.Sequential(nn.ModuleList([_Block(), _Block(), _Block()]))
    first, second = model[0][0], model[0][1]
    if kind == "a parameter":
        second.experts.down_proj = first.experts.down_proj
    elif kind == "a module":
        second.experts = first.experts
    else:
        model.all_tied_weights_keys = {"0.1.experts.down_proj": "0.0.experts.down_proj"}
    assert list(fused_experts(model)) == ["0.2.experts"]


@pytest.mark.parametrize("own", [nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)]), nn.Conv1d(4, 4, 3)])
def test_what_is_no_fused_module(own):
    assert fused_layout(own) is None


def test_compiled_whole():
    found = packed(fused("tokens come expert by expert"))
    prepare_layers(found)
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    for tokens in (7, 3):
        torch.testing.assert_close(compiled(*given(found.own, tokens)), found(*given(found.own, tokens)))


def test_triton_computes_the_same_from_its_own_layout():
    found = packed(fused("interleaved, transposed, biased", "grouped_mm"))
    inputs = given(found.own, 9)
    prepare_layers(found)
    wanted = found(*inputs)
    prepare_layers(found, "triton")
    assert {each.layout for each in found.modules() if isinstance(each, SABLinear)} == {"kernel"}
    torch.testing.assert_close(found(*inputs), wanted, rtol=2e-3, atol=2e-3)
    stored = found.state_dict()
    prepare_layers(found, "cpu")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in found.state_dict().items())
    torch.testing.assert_close(found(*inputs), wanted, rtol=0, atol=0)
