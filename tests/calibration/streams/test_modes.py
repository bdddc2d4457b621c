"""Modules are put back as they were."""

import torch
from torch import nn

from optimum_sab.calibration.streams.modes import modules_kept


class Scaled(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("scale", torch.ones(2))
        self.cache = {"a": 1}


def test_what_is_changed_inside_is_as_before_outside():
    model = nn.Sequential(Scaled(), nn.ReLU())
    first, scale = model[0], model[0].scale
    weight, kept = first.weight, first.register_forward_hook(lambda *_: None)
    order = list(vars(first))
    with modules_kept(model):
        first.register_forward_hook(lambda *_: None)
        first.register_forward_pre_hook(lambda *_: None)
        first._hooks_installed = True  # as Transformers notes it, whose hooks would be there twice
        first.scale.zero_()
        first.register_buffer("scale", torch.zeros(3), persistent=False)
        first.weight = nn.Parameter(torch.zeros(1))
        first.forward = lambda x: x
        first.cache["b"] = 2
        first.train(False)
        model.add_module("more", nn.ReLU())
        model[1] = nn.Tanh()
        del first.bias
    assert list(first._forward_hooks) == [kept.id] and not first._forward_pre_hooks
    assert (
        first.scale is scale and torch.equal(scale, torch.ones(2)) and "scale" not in first._non_persistent_buffers_set
    )
    assert first.weight is weight and first.bias is not None
    assert list(vars(first)) == order and first.cache == {"a": 1} and first.training
    assert [type(each) for each in model] == [Scaled, nn.ReLU]
