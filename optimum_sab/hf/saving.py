"""Saving with digests: every safetensors file says what its tensors were when it was written.

`SABHfQuantizer.get_state_dict_and_metadata` is asked once a save, before tensors have the names they are stored under
and before there are shards. It says which save it is. The digests are made where a file is written, of exactly what is
written, so `install` puts them around the function with which Transformers writes a file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import uuid
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import modeling_utils

from optimum_sab.core.code import NO_CODE
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError
from optimum_sab.format.digest import digest
from optimum_sab.format.layout import STORED_SETTINGS
from optimum_sab.hf.stored_files import DIGESTS_KEY, LAYERS_KEY, SAVE_KEY
from optimum_sab.hf.tensor_file import write_tensors
from optimum_sab.nn.decoder import find_decoder_blocks
from optimum_sab.nn.experts import SABExperts
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.scratch import apart, give_back


def install() -> None:
    """Have Transformers write digests into the files of packed models. Doing it again changes nothing."""
    written = modeling_utils.safe_save_file
    modeling_utils.safe_save_file = with_digests(getattr(written, "without_digests", written))


def with_digests(save_file: Callable[..., Any]) -> Callable[..., Any]:
    """`safetensors.torch.save_file` that adds its tensors' digests where the metadata names a save of ours.

    Such a file is written tensor by tensor (`write_tensors`).
    """

    @functools.wraps(save_file)
    def save(tensors: dict[str, Tensor], filename: Any, metadata: dict[str, str] | None = None) -> None:
        if metadata is not None and SAVE_KEY in metadata:
            digests = {name: _digest(tensor) for name, tensor in sorted(tensors.items())}
            write_tensors(tensors, filename, {**metadata, DIGESTS_KEY: json.dumps(digests)})
        else:
            save_file(tensors, filename, metadata=metadata)

    save.without_digests = save_file  # type: ignore[attr-defined]
    return save


def _digest(tensor: Tensor) -> str:
    found = digest(tensor)
    give_back(tensor)
    return found


def refuse_wrapped(model: nn.Module) -> None:
    """A packed layer within an adapter has a name under which nobody finds it again.

    Args:
        model: that is to be saved.

    Raises:
        ConfigError: adapters are around its packed layers.
    """
    for name, module in model.named_modules():
        if isinstance(module, SABLinear) and "base_layer" in name.split("."):
            raise ConfigError(
                f"{name} lies within an adapter, and a checkpoint with that name could not be loaded. Save the adapter "
                "with PeftModel.save_pretrained, and the packed model itself without it: before there are adapters, or "
                "what PeftModel.unload() returns."
            )


def describe_save(model: nn.Module) -> dict[str, str]:
    """What every file of a save is to say in its metadata: which save it is, and how its layers are packed.

    Args:
        model: as it is now, packed layers in it.
    """
    lists = find_decoder_blocks(model).lists
    layers = {
        lists.short(name): _stored_settings(module.settings)
        for name, module in model.named_modules()
        if isinstance(module, SABLinear)
    }
    return {SAVE_KEY: _identity(model), LAYERS_KEY: json.dumps(layers)}


def state_to_save(model: nn.Module) -> dict[str, Tensor] | None:
    """The model's state where it has packed experts; None, which has Transformers ask for it, where it has none.

    Those that are stacked, and so views of one tensor, are each given a storage of its own, in the same memory.
    Transformers copies what shares a storage, all of it at once, which is as much memory as all packed experts take.

    Args:
        model: as it is now.
    """
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, SABExperts))
    if not inside:
        return None
    state: dict[str, Tensor] = model.state_dict()
    for name, tensor in state.items():
        if name.startswith(inside) and _is_view(tensor):
            state[name] = apart(tensor)
    return state


def _is_view(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor or tensor.is_meta or not tensor.is_contiguous():
        return False
    return tensor.untyped_storage().nbytes() > tensor.nbytes


def _stored_settings(settings: LayerSettings) -> dict[str, object]:
    """As version 1 has them, where there is no code."""
    stored = {key: getattr(settings, key) for key in STORED_SETTINGS}
    return {key: value for key, value in stored.items() if (key, value) != ("code", NO_CODE)}


def _identity(model: nn.Module) -> str:
    """The same for the same weights, so saving a model twice gives the same files."""
    lines = []
    for name, value in sorted(model.state_dict().items()):
        readable = type(value) is Tensor and not value.is_meta
        lines.append(f"{name} {_digest(value) if readable else uuid.uuid4().hex}")  # an offloaded tensor is not here
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
