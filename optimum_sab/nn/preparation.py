"""Packed layers of a whole model, ready to compute."""

from __future__ import annotations

from torch import nn

from optimum_sab.nn.experts import SABExperts
from optimum_sab.nn.input_group import group_linears
from optimum_sab.nn.linear import SABLinear


def prepare_layers(model: nn.Module, backend: str | None = None) -> None:
    """Layers on an accelerator get the layout of its kernels, those that share an input are grouped,
    and those of experts are stacked.

    Args:
        model: with packed layers.
        backend: what computes; None or "auto" leaves it to the device.
    """
    experts = []
    for module in model.modules():
        if isinstance(module, SABLinear):
            module.backend = backend
            module.prepare()
        elif isinstance(module, SABExperts):
            experts.append(module)
    group_linears(model)
    for each in experts:
        each.prepare(backend)
