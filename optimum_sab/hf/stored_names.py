"""Names on disk and names in memory.

Transformers 5 renames, merges and splits tensors while it loads, and undoes that while it saves. Names go through its
own mapping, so a header is compared with the layer it will fill. What changes tensors' content is kept off packed
layers: their tensors are no matrices that could be split, stacked or permuted.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from optimum_sab.nn.decoder import BlockLists
from optimum_sab.nn.experts import SABExperts
from optimum_sab.nn.linear import SABLinear

MARKS = ("row_scale", "col_scale", "residual_sign")  # tensors that only a packed layer has


@dataclass(frozen=True)
class StoredNames:
    """Where Transformers loads the tensors of a checkpoint to.

    Attributes:
        keys: by name in the model's state dict: the name on disk. What the model has no place for is left out.
        corrections: what is to be added to the mapping that the model is loaded with.
        changed: names in the model of tensors that are merged, split or otherwise made others on their way.
    """

    keys: dict[str, str]
    corrections: tuple[Any, ...] = ()
    changed: frozenset[str] = frozenset()


def names_in_model(
    keys: Collection[str], model: nn.Module, transforms: Sequence[Any] | None, lists: BlockLists
) -> StoredNames:
    """Follow names on disk into the model.

    A mapping that names ``weight`` only may lead the other tensors of a packed layer nowhere (``conv`` ↔
    ``conv.weight``). They are found by the way they took when they were saved, and their way back is added.

    Args:
        keys: names on disk.
        model: the skeleton that is loaded into, packed layers in place.
        transforms: the mapping it is loaded with (`spare_packed`); None for a line of Transformers that has none, where
            names are matched from the decoder's block list on.
        lists: that the decoder blocks stand in.
    """
    wanted = model.state_dict()
    if transforms is None:
        return StoredNames(_by_block(keys, model, lists))
    from transformers.core_model_loading import WeightRenaming

    transforms = copy.deepcopy(list(transforms))  # they remember whether they were used
    base: Any = getattr(model, "base_model_prefix", None)
    found: dict[str, str] = {}
    changed = set()
    for key in keys:
        name, converter = _loaded(key, transforms, base, wanted)
        if name not in wanted and key in wanted:
            name, converter = key, None
        if name in wanted:
            found[name] = key
            if converter is not None:
                changed.add(name)
    used = [each for each in transforms if each.was_used()]
    corrections = []
    for name in sorted(_packed_tensors(model) & wanted.keys() - found.keys()):
        key = _saved(name, used)
        if key in keys:
            found[name] = key
            corrections.append(WeightRenaming("^" + _loaded(key, transforms)[0].replace(".", r"\."), name))
    return StoredNames(found, tuple(corrections), frozenset(changed))


def _by_block(keys: Collection[str], model: nn.Module, lists: BlockLists) -> dict[str, str]:
    """Names of packed layers' tensors only: a vision tower may have the same ones behind its own list of layers."""
    stems = {lists.short(stem): stem for stem, _, tensor in (key.rpartition(".") for key in keys) if tensor in MARKS}
    found = {}
    for name, module in model.named_modules():
        stem = stems.get(lists.short(name)) if isinstance(module, SABLinear) else None
        for tensor, _ in module.named_parameters(recurse=False) if stem is not None else ():
            if f"{stem}.{tensor}" in keys:
                found[f"{name}.{tensor}"] = f"{stem}.{tensor}"
    return found


def _loaded(key: str, transforms: Sequence[Any], base: str | None = None, wanted: Any = None) -> tuple[str, str | None]:
    """The name in the model of what is stored as ``key``, and what of it a converter is for, if one is."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    name, converter = rename_source_key(key, renamings, converters, base, wanted)
    return name, converter


def _saved(name: str, transforms: Sequence[Any]) -> str:
    """The name on disk of what is ``name`` in a model that was loaded with this mapping."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    back = [each.reverse_transform() for each in reversed(transforms)]
    renamings = [each for each in back if isinstance(each, WeightRenaming)]
    converters = [each for each in back if isinstance(each, WeightConverter)]
    return str(rename_source_key(name, renamings, converters, reverse=True)[0])


def spare_packed(transforms: Sequence[Any], model: nn.Module) -> list[Any]:
    """The same mapping, of which nothing but names applies to the tensors of the model's packed layers.

    Args:
        transforms: of loading, as Transformers gives them or keeps them with a model for saving.
        model: packed layers in place.
    """
    from transformers.core_model_loading import WeightConverter

    packed = _packed_tensors(model)
    return [_sparing(each, packed) if isinstance(each, WeightConverter) else each for each in transforms]


def _sparing(converter: Any, packed: frozenset[str]) -> Any:
    """A copy of a converter, and of its reverse, that finds none of these names."""
    kind = type(converter)

    def rename_source_key(self: Any, source_key: str) -> tuple[str, str | None]:
        return (source_key, None) if source_key in packed else kind.rename_source_key(self, source_key)

    members = {"__slots__": (), "rename_source_key": rename_source_key}
    sparing = copy.copy(converter)
    sparing.__class__ = type(f"{kind.__name__}SparingPacked", (kind,), members)
    return sparing


def _packed_tensors(model: nn.Module) -> frozenset[str]:
    """Names of the packed layers' tensors, with and without the base model's, since checkpoints have either.

    Dense linears of experts among them: Transformers would fuse these, and in the model they are not.
    """
    base = getattr(model, "base_model_prefix", "")
    names = set()
    experts = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, SABExperts))
    for layer, module in model.named_modules():
        if isinstance(module, SABLinear) or (isinstance(module, nn.Linear) and layer.startswith(experts)):
            own = [f"{layer}.{tensor}" for tensor, _ in module.named_parameters(recurse=False)]
            names.update(own)
            names.update(name.removeprefix(f"{base}.") for name in own if base)
            names.update(f"{base}.{name}" for name in own if base)
    return frozenset(names)
