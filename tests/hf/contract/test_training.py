"""Gradients through packed layers, to what is trained around them."""

import pytest
import torch
from torch import nn

from optimum_sab import SABLinear


class WithAdapter(nn.Module):
    """A packed linear and two small dense ones beside it."""

    def __init__(self, layer, rank=4):
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def give_adapters(model):
    model.requires_grad_(False)
    for block in model.model.layers:
        block.self_attn.q_proj = WithAdapter(block.self_attn.q_proj)
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["stored", "checkpointed", "checkpointed re-entrant"])
def test_adapters_on_packed_layers_are_given_gradients(model, ids, autocast, reentrant):
    adapters = give_adapters(model)
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(input_ids=ids, labels=ids).loss.backward()
    assert len(adapters) == 4
    for parameter in adapters:
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
    assert all(float(block.self_attn.q_proj.up.weight.grad.norm()) > 0 for block in model.model.layers)
    for layer in model.modules():
        if isinstance(layer, SABLinear):
            assert all(p.grad is None for p in layer.parameters())


def test_the_quantizer_says_that_adapters_can_be_trained_and_packed_weights_cannot(model):
    assert model.hf_quantizer.is_trainable is True
    assert model.hf_quantizer.is_qat_trainable is False
