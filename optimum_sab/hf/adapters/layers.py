"""The packed layers of a model as its adapters see them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from optimum_sab.nn.adapted import adapted
from optimum_sab.nn.experts import SABExperts
from optimum_sab.nn.linear import SABLinear


def packed_layers(model: nn.Module) -> dict[str, SABLinear]:
    """The packed layers by the names that they have without adapters.

    A layer that an adapter wraps stands one level below its own name, or several.
    """
    return {
        ".".join(part for part in name.split(".") if part != "base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, SABLinear)
    }


def show_packed_layers(model: nn.Module, is_adapter: type[Any], experts: bool = True) -> None:
    """Let adapters find the packed layers as linears, with the dtype of the activations around them.

    Args:
        model: with or without adapters.
        is_adapter: class of what wraps an adapted layer, whose parameters say nothing of activations.
        experts: those of experts too. In a dense model these are no linears.
    """
    modules = dict(model.named_modules())
    hidden = () if experts else tuple(f"{name}." for name, each in modules.items() if isinstance(each, SABExperts))
    for name, module in modules.items():
        if isinstance(module, SABLinear) and not name.startswith(hidden):
            adapted(module, _activation_dtype(modules, name, is_adapter))


def _activation_dtype(modules: dict[str, nn.Module], name: str, is_adapter: type[Any]) -> torch.dtype:
    """Of the floating-point parameters around a layer, those nearest to it: a norm of its block, as a rule."""
    while name:
        name = name.rpartition(".")[0]
        for parameter in _own_parameters(modules[name], is_adapter):
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.get_default_dtype()


def _own_parameters(module: nn.Module, is_adapter: type[Any]) -> Iterator[nn.Parameter]:
    if isinstance(module, is_adapter):
        return
    yield from module.parameters(recurse=False)
    for child in module.children():
        yield from _own_parameters(child, is_adapter)
