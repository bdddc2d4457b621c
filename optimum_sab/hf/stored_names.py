"""Names on disk and names in memory.

Transformers 5 renames, merges and splits tensors while it loads, and undoes that while it saves. Names go through its
own mapping, so a header is compared with the layer it will fill. What changes tensors' content is kept off packed
layers: their tensors are no matrices that could be split, stacked or permuted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from optimum_sab.hf.compat import RENAMES
from optimum_sab.nn.decoder import BlockLists
from optimum_sab.nn.linear import SABLinear


def names_in_model(
    keys: Iterable[str], model: nn.Module, transforms: Sequence[Any] | None, lists: BlockLists
) -> dict[str, str]:
    """Where Transformers will load tensors to.

    Args:
        keys: names on disk.
        model: the skeleton that is loaded into, packed layers in place.
        transforms: the mapping it is loaded with; None for a line of Transformers that has none, where names are
            matched from the decoder's block list on.
        lists: that the decoder blocks stand in.

    Returns:
        By name in the model's state dict: the name on disk. What the model has no place for is left out.
    """
    wanted = model.state_dict()
    if transforms is None or not RENAMES:
        short = {lists.short(name): name for name in wanted}
        return {short[cut]: key for key in keys if (cut := lists.short(key)) in short}
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = copy.deepcopy(list(transforms))  # they remember whether they were used
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    base: Any = model.base_model_prefix
    found: dict[str, str] = {}
    for key in keys:
        name, _ = rename_source_key(key, renamings, converters, base, wanted)
        if name not in wanted and key in wanted:
            name = key
        if name in wanted:
            found[name] = key
    return found


def spare_packed(transforms: Sequence[Any], model: nn.Module) -> list[Any]:
    """The same mapping, of which nothing but names applies to the tensors of the model's packed layers.

    Args:
        transforms: of loading, as Transformers gives them or keeps them with a model for saving.
        model: packed layers in place.
    """
    from transformers.core_model_loading import WeightConverter

    packed = _packed_tensors(model)
    return [_sparing(each, packed) if isinstance(each, WeightConverter) else each for each in transforms]


def as_before(transforms: Sequence[Any]) -> list[Any]:
    """What `spare_packed` was given, of these that it made: for a model whose packed layers became dense."""
    found = []
    for each in transforms:
        if hasattr(type(each), "_spares"):
            each = copy.copy(each)
            each.__class__ = type(each)._spares
        found.append(each)
    return found


def _sparing(converter: Any, packed: frozenset[str]) -> Any:
    """A copy of a converter, and of its reverse, that finds none of these names."""
    kind = type(converter)

    def rename_source_key(self: Any, source_key: str) -> tuple[str, str | None]:
        return (source_key, None) if source_key in packed else kind.rename_source_key(self, source_key)

    members = {"__slots__": (), "_spares": kind, "rename_source_key": rename_source_key}
    sparing = copy.copy(converter)
    sparing.__class__ = type(f"{kind.__name__}SparingPacked", (kind,), members)
    return sparing


def _packed_tensors(model: nn.Module) -> frozenset[str]:
    """Names of the packed layers' tensors, with and without the base model's, since checkpoints have either."""
    base = getattr(model, "base_model_prefix", "")
    names = set()
    for layer, module in model.named_modules():
        if isinstance(module, SABLinear):
            own = [f"{layer}.{tensor}" for tensor, _ in module.named_parameters(recurse=False)]
            names.update(own)
            names.update(name.removeprefix(f"{base}.") for name in own if base)
            names.update(f"{base}.{name}" for name in own if base)
    return frozenset(names)
