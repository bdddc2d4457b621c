"""Packed layers of a whole model, ready to compute."""

from __future__ import annotations

from torch import nn

from optimum_sab.nn.experts import SABExperts
from optimum_sab.nn.input_group import group_linears
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.streamed import weights_around


def prepare_layers(model: nn.Module, backend: str | None = None) -> None:
    """Layers on an accelerator get the layout of its kernels, those that share an input are grouped,
    and those of experts are stacked.

    Args:
        model: with packed layers.
        backend: what computes; None or "auto" leaves it to the device.
    """
    experts = {}
    for name, module in model.named_modules():
        if isinstance(module, SABLinear):
            module.backend = backend
            module.prepare()
        elif isinstance(module, SABExperts):
            experts[name] = module
    group_linears(model)
    for name, each in experts.items():
        with weights_around(model, name):  # of a model in files, one block's stacks are in memory at a time
            each.prepare(backend)
