"""Moving nested arguments, and blocks, between devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.errors import ConfigError
from optimum_sab.nn.streamed import is_streamed, weights_here


def device_of(module: nn.Module) -> torch.device | None:
    """Device of the module's first parameter; None if it has none."""
    parameter = next(module.parameters(), None)
    return None if parameter is None else parameter.device


def home_of(model: nn.Module) -> torch.device:
    """Where the model takes its inputs: the device of its first parameter that is anywhere."""
    return next(each.device for each in model.parameters() if not each.is_meta)


@contextmanager
def block_at(block: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Inside, the block's weights are there, on ``device`` (None: where they are); outside, they are at home again."""
    with weights_here(block):
        home = device_of(block)
        if device is None or home is None or home == device:
            yield
            return
        block.to(device)
        try:
            yield
        finally:
            if not is_streamed(block):  # what goes anyway need not travel
                block.to(home)


def brought(module: nn.Module, device: torch.device | None) -> dict[str, Tensor]:
    """The module's parameters and buffers by name on ``device``; none where they are there, or ``device`` is None."""
    if device is None or device_of(module) == device:
        return {}
    return {name: each.to(device) for name, each in (*module.named_parameters(), *module.named_buffers())}


def first_device(tree: Any) -> torch.device | None:
    """Device of the first tensor in nested dicts, lists and tuples; None if there is none."""
    if isinstance(tree, Tensor):
        return tree.device
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return next((d for d in map(first_device, children) if d is not None), None)


def map_tensors(tree: Any, device: torch.device) -> Any:
    """The tree with every tensor moved; other objects are passed on as they are."""
    return change_tensors(tree, lambda tensor: tensor.to(device))


def change_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The tree of dicts, lists and tuples with every tensor changed; other objects are passed on as they are."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: change_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(change_tensors(value, change) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(change_tensors(value, change) for value in tree)
    return tree


def refuse_spread(model: nn.Module, device: torch.device | None) -> None:
    """Weights that a device map has spread are moved about by its hooks already.

    Raises:
        ConfigError: a device is named beside such a map.
    """
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if device is not None and len(places) > 1:
        raise ConfigError(
            f"calibration_device={str(device)!r} cannot be used with a device_map over {', '.join(sorted(places))}: "
            "the blocks are worked on where they are then. Leave calibration_device out, or load with device_map='cpu'."
        )
