"""The modes in which a model is only read, or put back as it was."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from optimum_sab.nn.linear import SABLinear


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Arguments that keep the model's forward from making a cache, which nothing here reads; none if it makes none."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    takes = any(p.name == "use_cache" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return {"use_cache": False} if takes else {}


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and nothing records gradients; outside, it is in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def modules_kept(model: nn.Module) -> Iterator[None]:
    """Outside, modules are as they were: attributes, parameters, buffers (what is in them too), submodules and hooks.

    What is in parameters is not looked at. Packed layers keep what they compute with, which is theirs to look after.
    """
    modules = [module for module in model.modules() if not isinstance(module, SABLinear)]
    kept = [(module, dict(vars(module)), _contents(vars(module))) for module in modules]
    buffers = {id(each): (each, each.clone()) for each in model.buffers() if not each.is_meta}
    try:
        yield
    finally:
        for module, attributes, contents in kept:
            vars(module).clear()
            vars(module).update(attributes)
            for held, before in contents:
                held.clear()
                held.update(before)
        for buffer, content in buffers.values():
            buffer.copy_(content)


def _contents(attributes: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Dictionaries and sets among a module's attributes, which hold its tensors, submodules and hooks."""
    return [(each, each.copy()) for each in attributes.values() if isinstance(each, (dict, set))]
