"""What is put around PEFT's functions so that its adapters work on packed layers. Imports PEFT.

PEFT chooses what wraps a layer by the layer's class and computes with the layer by calling it; some methods read its
weight. So packed layers are shown to it as linears, methods that read the weight are refused, and where PEFT
dequantizes other formats it dequantizes ours. Nothing is replaced: its own functions run, with ours before or after.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from peft.tuners.adaption_prompt import AdaptionPromptModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import integrations, other, quantization_utils
from torch import nn

from optimum_sab.hf.adapters.backend import PackedBackend, dense_weight
from optimum_sab.hf.adapters.layers import packed_layers, show_packed_layers
from optimum_sab.hf.adapters.support import check_adapter, refuse_merging, refuse_training
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.shared import refuse_shares

ALL_LINEAR = "all-linear"


class Place(NamedTuple):
    """A function of PEFT's: class or module, name, and what is put around it, which is given the function first."""

    owner: Any
    name: str
    ours: Callable[..., Any]


def places() -> list[Place]:
    """All of them. Layers are asked one by one too, since each can be merged by itself."""
    layers = [each for each in _family(BaseTunerLayer) if "merge" in vars(each)]
    return [
        Place(BaseTuner, "__init__", begin),
        Place(BaseTuner, "inject_adapter", inject),
        Place(AdaptionPromptModel, "add_adapter", add_prompt),
        Place(BaseTuner, "merge_adapter", merge),
        Place(BaseTuner, "merge_and_unload", merge),
        *(Place(each, "merge", merge) for each in layers),
        Place(integrations, "dequantize_module_weight", dequantize),
        Place(quantization_utils, "resolve_quantization_backend", resolve_backend),
        Place(other, "prepare_model_for_kbit_training", prepare),
    ]


def _family(root: type[Any]) -> set[type[Any]]:
    return {root}.union(*(_family(each) for each in root.__subclasses__()))


def begin(
    theirs: Callable[..., Any], tuner: Any, model: nn.Module, config: Any, adapter_name: str, *more: Any, **options: Any
) -> None:
    """A tuner's `__init__`, which may look for linears, and read them, before it replaces any."""
    refuse_shares(model, "adapted")
    own = config[adapter_name] if isinstance(config, dict) else config
    show_packed_layers(model, BaseTunerLayer, experts=not _every(own))
    if getattr(own, "target_modules", None) is not None:  # else `inject` knows them
        _refuse(tuner, own, packed_layers(model))
    theirs(tuner, model, config, adapter_name, *more, **options)


def inject(
    theirs: Callable[..., Any], tuner: Any, model: nn.Module, adapter_name: str, *more: Any, **options: Any
) -> None:
    """An adapter for a model, the first or a further one: refused before a layer is replaced."""
    refuse_shares(model, "adapted")
    show_packed_layers(model, BaseTunerLayer, experts=not _every(tuner.peft_config[adapter_name]))
    packed = packed_layers(model)
    if packed:
        config = tuner._prepare_adapter_config(tuner.peft_config[adapter_name], tuner.get_model_config(model))
        _refuse(tuner, config, packed)
    theirs(tuner, model, adapter_name, *more, **options)


def _refuse(tuner: Any, config: Any, packed: dict[str, SABLinear]) -> None:
    every = _every(config)
    check_adapter(config, [name for name in packed if every or tuner._check_target_module_exists(config, name)])
    _refuse_trained(config, packed)


def _every(config: Any) -> bool:
    """Whether all linears are to be adapted."""
    targets = getattr(config, "target_modules", None)
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def _refuse_trained(config: Any, packed: dict[str, SABLinear]) -> None:
    for name in packed:
        for ending in getattr(config, "modules_to_save", None) or ():
            if _inside(name, ending):
                refuse_training(f"modules_to_save={ending!r}", name)
        for ending in getattr(config, "target_parameters", None) or ():
            if f"{name}.weight".endswith(ending):
                refuse_training(f"target_parameters={ending!r}", name)


def _inside(name: str, ending: str) -> bool:
    """Whether a module is one whose name ends so, or is in one."""
    parts = name.split(".")
    return any(".".join(parts[:count]).endswith(ending) for count in range(1, len(parts) + 1))


def add_prompt(theirs: Callable[..., Any], tuner: Any, adapter_name: str, config: Any) -> None:
    """The one tuner that wraps whole attentions, and takes its own dtype from a weight in them."""
    refuse_shares(tuner.model, "adapted")
    check_adapter(config, packed_layers(tuner.model))
    theirs(tuner, adapter_name, config)


def merge(theirs: Callable[..., Any], merged: Any, *arguments: Any, **options: Any) -> Any:
    """Of a whole tuner, or of one layer: refused before anything is merged."""
    chosen = inspect.signature(theirs).bind(merged, *arguments, **options).arguments.get("adapter_names")
    for name, layer in merged.named_modules():
        if isinstance(layer, BaseTunerLayer) and isinstance(layer.get_base_layer(), SABLinear):
            names = layer.active_adapters if chosen is None else chosen
            if layer._get_available_adapters().intersection(names):
                refuse_merging(name.removeprefix("model.") or "a layer")
    return theirs(merged, *arguments, **options)


def dequantize(theirs: Callable[..., Any], module: nn.Module) -> Any:
    """The dense weight of a layer, which DoRA takes the norm of."""
    return dense_weight(module) if isinstance(module, SABLinear) else theirs(module)


def resolve_backend(theirs: Callable[..., Any], base_layer: nn.Module, **options: Any) -> Any:
    """What stands for a layer's format in PEFT's newer methods."""
    return PackedBackend() if isinstance(base_layer, SABLinear) else theirs(base_layer, **options)


def prepare(theirs: Callable[..., Any], model: Any, *arguments: Any, **options: Any) -> Any:
    """PEFT switches activation checkpointing on for models of the formats it knows; packed ones are no less."""
    prepared = theirs(model, *arguments, **options)
    given = inspect.signature(theirs).bind(model, *arguments, **options)
    given.apply_defaults()
    if given.arguments["use_gradient_checkpointing"] and packed_layers(model):
        kind = given.arguments["gradient_checkpointing_kwargs"]
        if (kind or {}).get("use_reentrant", True):
            prepared.enable_input_require_grads()  # or nothing that is checkpointed has a gradient
        enable = getattr(prepared, "activation_checkpointing_enable", None) or prepared.gradient_checkpointing_enable
        enable(kind)
    return prepared
