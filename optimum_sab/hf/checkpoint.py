"""Check a packed checkpoint's headers against the model before anything is loaded from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from optimum_sab.core.code import NO_CODE
from optimum_sab.errors import FormatError
from optimum_sab.format.layout import STORED_SETTINGS, tensor_specs
from optimum_sab.hf.stored_files import StoredFile, StoredTensor
from optimum_sab.hf.stored_names import MARKS, StoredNames, names_in_model
from optimum_sab.nn.decoder import BlockLists
from optimum_sab.nn.linear import SABLinear

_DTYPES = {torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}


def check_layers(
    model: nn.Module, lists: BlockLists, files: Sequence[StoredFile], transforms: Sequence[Any] | None = None
) -> StoredNames:
    """Every packed layer of ``model`` must have all its tensors in the files, in the right shape and dtype.

    Args:
        model: the skeleton, `SABLinear` in place.
        lists: that the decoder blocks stand in.
        files: the checkpoint's.
        transforms: see `names_in_model`.

    Returns:
        Where the tensors are loaded to.

    Raises:
        FormatError: a tensor is missing or misshapen, or the configuration describes other layers than were saved.
    """
    stored = {name: tensor for file in files for name, tensor in file.tensors.items()}
    names = names_in_model(stored, model, transforms, lists)
    keys = names.keys
    _refuse_packed_elsewhere(model, lists, stored, keys)
    saved = files[0].layers if files else {}
    packed = {
        name: (module, _tensors_of(name, module, keys, stored))
        for name, module in model.named_modules()
        if isinstance(module, SABLinear)
    }
    for name, (layer, tensors) in packed.items():
        if not set(tensors) - {"weight", "bias"}:
            raise FormatError(
                f"{name}: no packed tensors in the checkpoint; it is incomplete, or its quantization_config does "
                "not belong to it."
            )
        _check_settings(name, layer, saved.get(lists.short(name)))
    _refuse_missing(packed)
    for name, (layer, tensors) in packed.items():
        _check_tensors(name, layer, tensors)
    return names


def check_dense(model: nn.Module, files: Sequence[StoredFile], names: StoredNames) -> None:
    """What is not packed must have the shapes that the model has; Transformers names the tensor in its log alone.

    Args:
        model: the skeleton.
        files: the checkpoint's.
        names: what `check_layers` gave.

    Raises:
        FormatError: a tensor has another shape.
    """
    stored = {name: tensor for file in files for name, tensor in file.tensors.items()}
    for name, wanted in model.state_dict().items():
        key = names.keys.get(name)
        if key is not None and name not in names.changed and stored[key].shape != tuple(wanted.shape):
            raise FormatError(
                f"tensor {key!r} is {stored[key].dtype} {stored[key].shape}, and the model's is {tuple(wanted.shape)}; "
                "the checkpoint is damaged or its config.json is another's: fetch both again."
            )


def _tensors_of(
    name: str, layer: SABLinear, keys: Mapping[str, str], stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """What the checkpoint has of a layer, by the format's names; a bias, too, that the layer has no place for."""
    names = {
        tensor: keys[full]
        for tensor in (*tensor_specs(layer.out_features, layer.in_features, layer.settings), "bias")
        if (full := f"{name}.{tensor}") in keys
    }
    if names:
        foreign = f"{next(iter(names.values())).rpartition('.')[0]}.bias"
        if foreign in stored:
            names.setdefault("bias", foreign)
    return {tensor: stored[key] for tensor, key in names.items()}


def _refuse_missing(packed: Mapping[str, tuple[SABLinear, Mapping[str, StoredTensor]]]) -> None:
    """Before anything is said about what is there: a tensor that is not is the likelier cause."""
    missing = [
        (name, tensor)
        for name, (layer, tensors) in packed.items()
        for tensor in (*layer.shape.names, *(() if layer.bias is None else ("bias",)))
        if tensor not in tensors
    ]
    if missing:
        name, tensor = missing[0]
        more = f", and {len(missing) - 1} more of packed layers" if len(missing) > 1 else ""
        raise FormatError(f"{name}: tensor {tensor!r} is missing{more}; the checkpoint is incomplete, fetch it again.")


def _refuse_packed_elsewhere(
    model: nn.Module, lists: BlockLists, stored: Mapping[str, StoredTensor], keys: Mapping[str, str]
) -> None:
    """No layer may be packed in the files and dense in the model."""
    dense = {lists.short(n): n for n, m in model.named_modules() if isinstance(m, nn.Linear) and lists.holds(n)}
    taken = set(keys.values())
    for key in stored:
        stem, _, tensor = key.rpartition(".")
        name = dense.get(lists.short(stem))
        if tensor in MARKS and key not in taken and name is not None:
            raise FormatError(
                f"{name}: packed in the checkpoint, but its quantization_config leaves it dense; they do not belong "
                "together, fetch both again."
            )


def _check_settings(name: str, layer: SABLinear, saved: Mapping[str, object] | None) -> None:
    """Two block sizes or shares of salient columns may have the same shapes, and other weights."""
    for setting in STORED_SETTINGS if saved is not None else ():
        given, default = getattr(layer.settings, setting), NO_CODE if setting == "code" else None
        if saved is not None and saved.get(setting, default) != given:
            raise FormatError(
                f"{name}: was saved with {setting}={saved.get(setting, default)!r}, and config.json says {given!r}; it "
                "was changed since, fetch it again."
            )


def _check_tensors(name: str, layer: SABLinear, stored: Mapping[str, StoredTensor]) -> None:
    for tensor, spec in tensor_specs(layer.out_features, layer.in_features, layer.settings).items():
        found = stored[tensor]
        if (found.shape, found.dtype) != (spec.shape, _DTYPES[spec.dtype]):
            raise FormatError(
                f"{name}: tensor {tensor!r} is {found.dtype} {found.shape}, expected {_DTYPES[spec.dtype]} "
                f"{spec.shape}; the checkpoint and its quantization_config do not belong together."
            )
    bias = stored.get("bias")
    if bias is not None and layer.bias is None:
        raise FormatError(
            f"{name}: tensor 'bias' is in the checkpoint, but the model has none; they do not belong together."
        )
    if bias is not None and (bias.shape != (layer.out_features,) or not bias.is_floating):
        raise FormatError(
            f"{name}: tensor 'bias' is {bias.dtype} {bias.shape}, expected a floating one of {(layer.out_features,)}; "
            "the checkpoint is damaged, fetch it again."
        )
