"""Adapters on a mixture of experts: on everything else by default, on experts where they are named."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.preparation import prepare_layers
from tests.nn.fused import EXPERTS, fused, given
from tests.nn.test_experts import packed

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="experts are no one module")


class Model(nn.Module):
    """A packed linear, then packed experts."""

    def __init__(self):
        super().__init__()
        from optimum_sab.core.settings import LayerSettings
        from optimum_sab.format.random_weight import random_packed

        self.proj = SABLinear.from_packed(random_packed(64, 64, LayerSettings()))
        self.experts = packed(fused("plain", "grouped_mm"))
        prepare_layers(self)

    def forward(self, hidden, chosen, weights):
        return self.experts(self.proj(hidden), chosen, weights)


def adapted(**options):
    torch.manual_seed(0)
    model = peft.get_peft_model(Model(), peft.LoraConfig(r=2, init_lora_weights=False, **options))
    return model.base_model.model


def test_all_linear_is_all_but_experts_as_in_a_dense_model():
    model = adapted(target_modules="all-linear")
    assert hasattr(model.proj, "lora_A")
    assert all(type(model.experts.linear(e, "down_proj")) is SABLinear for e in range(EXPERTS))
    assert model(*given(model.experts.own, 9)).isfinite().all()


def test_experts_that_are_named_are_adapted_and_trained():
    model = adapted(target_modules=["1.down_proj", "3.gate_up_proj"])
    assert hasattr(model.experts.linear(1, "down_proj"), "lora_A")
    plain = Model()
    hidden, chosen, weights = given(model.experts.own, 9)
    found = model(hidden, chosen, weights)
    with torch.no_grad():
        model.experts.linear(1, "down_proj").lora_B["default"].weight.zero_()
        model.experts.linear(3, "gate_up_proj").lora_B["default"].weight.zero_()
    same = model(hidden, chosen, weights)
    torch.testing.assert_close(same, plain(hidden, chosen, weights), rtol=1e-4, atol=1e-4)
    touched = ((chosen == 1) | (chosen == 3)).any(-1)
    changed = (found - same).norm(dim=-1) > 1e-6
    assert torch.equal(changed, touched)
    model(hidden, chosen, weights).square().sum().backward()
    assert model.experts.linear(1, "down_proj").lora_B["default"].weight.grad.norm() > 0
