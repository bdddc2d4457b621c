"""What is put around PEFT's own functions so that its adapters work on packed layers.

PEFT chooses what wraps a layer by the layer's class, computes with the layer by calling it, and reads its weight only in
some methods. So packed layers are shown to it as linears, methods that read the weight are refused, and where PEFT
dequantizes other formats it dequantizes ours. Nothing of PEFT's is replaced: each function runs, with ours before it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.errors import warn
from optimum_sab.hf.adapters.after_import import after_import
from optimum_sab.hf.adapters.layers import packed_layers, show_packed_layers
from optimum_sab.hf.adapters.support import check_adapter, refuse_merging, refuse_training
from optimum_sab.nn.linear import SABLinear

PACKAGE = "peft"
OURS = "_without_packed_layers"  # PEFT's own function, kept on ours


def await_peft() -> None:
    """Have PEFT know packed layers, now or when it is imported. Doing it again changes nothing."""
    after_import(PACKAGE, install)


def install() -> None:
    """Put ours around PEFT's functions. A release of PEFT that has them elsewhere is left as it is, with a warning."""
    try:
        places = _places()
    except (ImportError, AttributeError) as error:
        version = getattr(sys.modules.get(PACKAGE), "__version__", "?")
        warn(f"PEFT {version} does not adapt packed layers ({error}); 0.21 does.")
        return
    for owner, name, ours in places:
        _put_around(owner, name, ours)


def _places() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Class or module, function, and what is put around it."""
    tuners = importlib.import_module("peft.tuners.tuners_utils")
    mapping = importlib.import_module("peft.mapping")
    integrations = importlib.import_module("peft.utils.integrations")
    other = importlib.import_module("peft.utils.other")
    quantization = importlib.import_module("peft.utils.quantization_utils")
    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (tuners.BaseTuner, "__init__", _begin),
        (tuners.BaseTuner, "inject_adapter", _inject),
        (tuners.BaseTuner, "merge_adapter", _merge),
        (tuners.BaseTuner, "merge_and_unload", _merge),
        (integrations, "dequantize_module_weight", _dequantize),
        (quantization, "resolve_quantization_backend", _resolve_backend),
        (other, "prepare_model_for_kbit_training", _prepare),
    ]
    places += [(each, "merge", _merge) for each in _family(tuners.BaseTunerLayer) if "merge" in vars(each)]
    places += [
        (each, "__init__", _begin_apart)
        for each in mapping.PEFT_TYPE_TO_TUNER_MAPPING.values()
        if issubclass(each, nn.Module) and not issubclass(each, tuners.BaseTuner) and "config" in _arguments(each)
    ]
    for owner, name, _ in places:
        getattr(owner, name)
    return places


def _family(root: type[Any]) -> set[type[Any]]:
    return {root}.union(*(_family(each) for each in root.__subclasses__()))


def _arguments(each: type[Any]) -> Any:
    return inspect.signature(each.__init__).parameters


def _put_around(owner: Any, name: str, ours: Callable[..., Any]) -> None:
    """``owner.name`` becomes ``ours(theirs, …)``, also where modules took it by name."""
    known = getattr(owner, name)
    theirs = getattr(known, OURS, known)

    @functools.wraps(theirs)
    def around(*arguments: Any, **options: Any) -> Any:
        return ours(theirs, *arguments, **options)

    setattr(around, OURS, theirs)
    setattr(owner, name, around)
    if not inspect.isclass(owner):
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is known:
                setattr(module, name, around)


def _begin(theirs: Callable[..., Any], tuner: Any, model: nn.Module, *arguments: Any, **options: Any) -> None:
    """A tuner's `__init__`: what is done before modules are replaced may already ask for linears."""
    _show(model)
    theirs(tuner, model, *arguments, **options)


def _inject(
    theirs: Callable[..., Any], tuner: Any, model: nn.Module, adapter_name: str, *arguments: Any, **options: Any
) -> None:
    """Adapters for a model, the first or a further one: refused before anything is replaced."""
    packed = _show(model)
    if packed:
        config = tuner.peft_config[adapter_name]
        config = tuner._prepare_adapter_config(config, tuner.get_model_config(model))
        check_adapter(config, _targets(tuner, config, packed))
        for name in packed:
            for ending in getattr(config, "modules_to_save", None) or ():
                if _inside(name, ending):
                    refuse_training(f"modules_to_save={ending!r}", name)
            for ending in getattr(config, "target_parameters", None) or ():
                if f"{name}.weight".endswith(ending):
                    refuse_training(f"target_parameters={ending!r}", name)
    theirs(tuner, model, adapter_name, *arguments, **options)


def _targets(tuner: Any, config: Any, packed: dict[str, SABLinear]) -> list[str]:
    every = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    return [name for name in packed if every or tuner._check_target_module_exists(config, name)]


def _inside(name: str, ending: str) -> bool:
    """Whether a module is, or is in, one whose name ends so."""
    parts = name.split(".")
    return any(".".join(parts[:count]).endswith(ending) for count in range(1, len(parts) + 1))


def _begin_apart(theirs: Callable[..., Any], tuner: Any, model: nn.Module, *arguments: Any, **options: Any) -> None:
    """A tuner that replaces no linears but attention as a whole, and takes its dtype from a weight."""
    given = inspect.signature(theirs).bind(tuner, model, *arguments, **options).arguments
    configs = given.get("config", given.get("configs"))
    for config in configs.values() if isinstance(configs, dict) else [configs]:
        check_adapter(config, packed_layers(model))
    theirs(tuner, model, *arguments, **options)


def _merge(theirs: Callable[..., Any], merged: Any, *arguments: Any, **options: Any) -> Any:
    """Of a tuner or of one layer: refused before anything is merged."""
    given = inspect.signature(theirs).bind(merged, *arguments, **options).arguments
    chosen = given.get("adapter_names")
    layer_class = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    for name, layer in merged.named_modules():
        if isinstance(layer, layer_class) and isinstance(layer.get_base_layer(), SABLinear):
            if layer._get_available_adapters().intersection(layer.active_adapters if chosen is None else chosen):
                refuse_merging(name.removeprefix("model.") or type(layer).__name__)
    return theirs(merged, *arguments, **options)


def _dequantize(theirs: Callable[..., Any], module: nn.Module) -> Any:
    return _dense(module) if isinstance(module, SABLinear) else theirs(module)


def _dense(layer: SABLinear) -> Tensor:
    dense: Tensor = layer.packed.dequantize().to(getattr(layer, "compute_dtype", torch.float32))
    return dense


def _resolve_backend(theirs: Callable[..., Any], base_layer: nn.Module, **options: Any) -> Any:
    if not isinstance(base_layer, SABLinear):
        return theirs(base_layer, **options)
    quantization = importlib.import_module("peft.utils.quantization_utils")
    backend = quantization.ForwardOnlyQuantizationBackend("sab")
    backend.get_base_weight = _base_weight
    return backend


def _base_weight(base_layer: nn.Module) -> Tensor:
    """What the layer computes with now: it may have been dequantized since."""
    weight: Any = _dense(base_layer) if isinstance(base_layer, SABLinear) else base_layer.weight
    return weight.detach()


def _prepare(theirs: Callable[..., Any], model: nn.Module, *arguments: Any, **options: Any) -> Any:
    """PEFT switches gradient checkpointing on for the formats it knows; packed models are one more."""
    prepared = theirs(model, *arguments, **options)
    given = inspect.signature(theirs).bind(model, *arguments, **options)
    given.apply_defaults()
    wanted = given.arguments["use_gradient_checkpointing"]
    if wanted and packed_layers(model) and not getattr(model, "is_gradient_checkpointing", False):
        kind = given.arguments["gradient_checkpointing_kwargs"] or {}
        if kind.get("use_reentrant", True):
            prepared.enable_input_require_grads()  # or nothing before the first adapter has a gradient
        prepared.gradient_checkpointing_enable(**({"gradient_checkpointing_kwargs": kind} if kind else {}))
    return prepared


def _show(model: nn.Module) -> dict[str, SABLinear]:
    """The packed layers, as linears."""
    packed = packed_layers(model)
    if packed:
        show_packed_layers(model, importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer)
    return packed
