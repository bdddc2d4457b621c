"""A checkpoint whose decoder blocks stay in their files while the model is loaded, and are read one at a time.

What becomes of the stored tensors (names, merged and split matrices, dtypes) is for Transformers to say. Its own
function that fills a model is asked three times: with tensors on meta in the place of all stored ones, to see what
comes of them; with those outside of the blocks, to fill the model; and, later, with those of one block, to fill a twin
of the model from which they are taken. What is outside of the blocks is filled in portions that leave memory at once.
`install` puts `asking` around that function, since a quantizer cannot tell Transformers in any other way what it is to
leave out.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from transformers import modeling_utils

from optimum_sab.errors import ConfigError, StreamError
from optimum_sab.hf.compat import RENAMES
from optimum_sab.hf.stored_files import StoredFile, read_headers
from optimum_sab.nn.scratch import Scratch
from optimum_sab.nn.streamed import StreamedBlock

PORTION = 2**28  # bytes of what is read at a time of the weights outside of the blocks
_FILLS = "convert_and_load_state_dict_in_model"  # the function's name, from Transformers 5 on
Fill = Callable[..., Any]


def install() -> None:
    """Have Transformers ask a quantizer that streams. Doing it again changes nothing."""
    own = getattr(modeling_utils, _FILLS, None)
    if own is not None:
        setattr(modeling_utils, _FILLS, asking(getattr(own, "without_streaming", own)))


def asking(fill: Fill) -> Fill:
    """Transformers' function that fills a model, which leaves out what the loading's quantizer streams."""

    @functools.wraps(fill)
    def filled(model: Any, state_dict: Any, load_config: Any, disk_offload_index: Any = None) -> Any:
        streaming = getattr(load_config.hf_quantizer, "streaming", None)
        if isinstance(streaming, Streaming):
            return streaming.fill(fill, model, state_dict, load_config)
        return fill(model, state_dict, load_config, disk_offload_index)

    filled.without_streaming = fill  # type: ignore[attr-defined]
    return filled


def check_streaming(call: Mapping[str, Any], device_map: Any) -> None:
    """Refuse what cannot be streamed, before anything is read.

    Args:
        call: the variables of the running `from_pretrained`.
        device_map: as it was given there.

    Raises:
        ConfigError: Transformers is too old, weights are given in memory, or a device map places them.
    """
    if not RENAMES or not hasattr(modeling_utils, _FILLS):
        raise ConfigError("stream_weights needs Transformers 5; upgrade it, or leave stream_weights out.")
    if call.get("state_dict") is not None:
        raise ConfigError("stream_weights reads weights from their files, and state_dict gives them; leave one out.")
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    if any(str(place) not in ("None", "cpu") for place in places):
        raise ConfigError(
            f"stream_weights does not go with device_map={device_map!r}, which places all of the dense model, and with "
            "it no more than a block at a time is there. Leave device_map out, name the accelerator in "
            "SABConfig(calibration_device=...), --calibration-device, and bring the packed model to it afterwards."
        )


def check_stored(files: Sequence[str] | None) -> None:
    """Refuse weights of another format.

    Raises:
        ConfigError: a file is no safetensors file, of which a part can be read.
    """
    other = next((file for file in files or () if not str(file).endswith(".safetensors")), None)
    if other is not None:
        raise ConfigError(
            f"stream_weights reads parts of safetensors files, and {os.path.basename(other)} is none. Load the model "
            "once without it and save it with save_pretrained, which writes safetensors; or leave stream_weights out."
        )


class Streaming:
    """One loading of which decoder blocks are left in their files.

    Args:
        blocks: dotted names of the decoder blocks.
        files: the checkpoint's.
        scratch: where weights outside of the blocks lie, and what has been made of the blocks; None for memory.
    """

    def __init__(self, blocks: Sequence[str], files: Sequence[str], scratch: Scratch | None = None) -> None:
        self._blocks = tuple(blocks)
        self._files = tuple(map(str, files))
        self.scratch = scratch
        self.sources: list[StreamedBlock] = []

    def fill(self, fill: Fill, model: Any, state_dict: Mapping[str, Any], load_config: Any) -> Any:
        """In the place of Transformers' function: fill everything but the blocks.

        Args:
            fill: that function.
            model: on meta.
            state_dict: lazy tensors by their stored name.
            load_config: of this loading.

        Returns:
            What the function gives, as if it had filled the blocks too.

        Raises:
            ConfigError: the blocks share weights with each other or with the rest of the model; or what comes of a
            tensor does not show without its values.
        """
        self._refuse_tied(model)
        stored = StoredTensors(read_headers(self._files))
        twin = _twin(model)
        on_meta = {key: stored.on_meta(key) for key in state_dict}
        # every call is given a mapping of its own, since mappings remember by what they were used
        given = copy.deepcopy(load_config.weight_mapping)
        trial = replace(load_config, device_map={"": "meta"}, weight_mapping=copy.deepcopy(given))
        with _without_bar():
            info, index = fill(twin, on_meta, trial)
        for name, reason in info.conversion_errors.items():
            raise ConfigError(
                f"stream_weights has to know what comes of every stored tensor without reading it, and of {name} that "
                f"does not show ({reason.strip().splitlines()[-1]}); leave stream_weights out for this model."
            )
        lost = info.missing_keys | {name for name, *_ in info.mismatched_keys}
        destinations = _destinations(model, on_meta, given)
        owners = _owners(destinations, self._blocks)
        for portion in _portions(stored, {key: name for key, name in destinations.items() if key not in owners}):
            own = replace(load_config, weight_mapping=copy.deepcopy(given))
            with stored.opened(portion) as lazy, _without_bar():
                found, _ = fill(model, lazy, own)
            info.error_msgs.extend(found.error_msgs)
            info.conversion_errors.update(found.conversion_errors)
            if self.scratch is not None:
                self.scratch.put(each for each in (*model.parameters(), *model.buffers()) if not each.is_meta)
        model._weight_conversions = twin._weight_conversions  # what all of the checkpoint has used
        plain = replace(load_config, hf_quantizer=None)
        for block in self._blocks:
            names = tuple(n for n in twin.state_dict() if n.startswith(f"{block}.") and n not in lost)
            for name in names:
                if name.endswith(_EXTRA_STATE_KEY_SUFFIX):
                    raise ConfigError(f"stream_weights reads tensors, and {name} is none; leave it out for this model.")
                _tensor(model, name)._is_hf_initialized = True  # type: ignore[attr-defined]  # nobody is to draw it
            keys = tuple(key for key, owner in owners.items() if owner == block)
            source = _BlockSource(fill, twin, stored, replace(plain, weight_mapping=copy.deepcopy(given)))
            self.sources.append(StreamedBlock(block, functools.partial(source.read, block, keys, names)))
        return info, index

    def _refuse_tied(self, model: Any) -> None:
        starts = tuple(f"{block}." for block in self._blocks)
        for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            if name.startswith(starts) or source.startswith(starts):
                raise ConfigError(
                    f"stream_weights reads every decoder block by itself, and {name} of {type(model).__name__} is "
                    f"shared with {source}; leave stream_weights out for this model."
                )


class StoredTensors:
    """The tensors of safetensors files, by their names there.

    Args:
        files: their headers.
    """

    def __init__(self, files: Sequence[StoredFile]) -> None:
        self._entries = {key: (file.path, tensor) for file in files for key, tensor in file.tensors.items()}
        self._marks = {file.path: _mark(file.path) for file in files}

    def on_meta(self, key: str) -> Tensor:
        """A tensor of the same shape and dtype that holds nothing."""
        _, entry = self._entries[key]
        return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype_name), device="meta")

    @contextmanager
    def opened(self, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Lazy tensors by their names. What they give when they are read is in memory of its own.

        Raises:
            StreamError: a file is gone, damaged, or no longer what it was when its header was read.
        """
        places = {key: self._entries[key][0] for key in keys}
        paths = sorted(set(places.values()))
        with ExitStack() as stack:
            handles: dict[str, Any] = {path: stack.enter_context(self._open(path)) for path in paths}
            yield {key: _LazyTensor(handles[path], key) for key, path in places.items()}
        for path in paths:
            self._check(path)

    def _open(self, path: str) -> Any:
        self._check(path)
        try:
            return safe_open(path, framework="pt", device="cpu", backend="pread")
        except (SafetensorError, OSError) as error:
            raise StreamError(f"{path} cannot be read any more ({error}). {_AGAIN}") from error

    def _check(self, path: str) -> None:
        try:
            changed = _mark(path) != self._marks[path]
        except OSError as error:
            raise StreamError(f"{path} cannot be read any more ({error}). {_AGAIN}") from error
        if changed:
            raise StreamError(f"{path} has changed while its weights were read. {_AGAIN}")


class _LazyTensor:
    """A slice of a safetensors file. All of it is in memory once while it is read; ``slice[...]`` holds it twice."""

    def __init__(self, file: Any, key: str) -> None:
        self._file, self._key, self._slice = file, key, file.get_slice(key)

    def __getitem__(self, index: Any) -> Tensor:
        found: Tensor = self._file.get_tensor(self._key) if index is Ellipsis else self._slice[index]
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slice, name)


_AGAIN = "Put the checkpoint back as it was and start again; with a resume_folder, finished blocks are not lost."


def _mark(path: str) -> tuple[int, ...]:
    """What changes when a file does."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class _BlockSource:
    """Reads blocks by way of a twin of the model."""

    def __init__(self, fill: Fill, twin: Any, stored: StoredTensors, load_config: Any) -> None:
        self._fill, self._twin, self._stored, self._config = fill, twin, stored, load_config

    def read(self, block: str, keys: Sequence[str], names: Sequence[str]) -> dict[str, Tensor]:
        """A block's tensors by their names inside of it.

        Args:
            block: its dotted name.
            keys: what is stored of it.
            names: in the model, of what comes of that.
        """
        before = {name: _tensor(self._twin, name) for name in names}
        try:
            with self._stored.opened(keys) as lazy, _without_bar(), torch.no_grad():
                self._fill(self._twin, lazy, self._config)
            found = {name: _tensor(self._twin, name) for name in names}
        finally:
            for name, tensor in before.items():
                _put(self._twin, name, tensor)
        missing = next((name for name, tensor in found.items() if tensor.is_meta), None)
        if missing is not None:
            raise StreamError(f"{missing} cannot be had from the checkpoint's files. {_AGAIN}")
        return {name.removeprefix(f"{block}."): tensor.detach() for name, tensor in found.items()}


def _twin(model: Any) -> Any:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # a model's own code decides what can be copied
        kind = type(model).__name__
        raise ConfigError(f"stream_weights copies the empty {kind}, which fails ({error}); leave it out.") from error


def _destinations(model: Any, keys: Collection[str], mapping: Sequence[Any] | None) -> dict[str, str]:
    """By stored name: the tensor of the model that it is for, found as Transformers finds it.

    Of one that is merged or split it is one of them, the same for all that are merged with each other.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = copy.deepcopy(list(mapping or ()))
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    wanted, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for key in keys:
        name = rename_source_key(key, renamings, converters, prefix, wanted)[0]
        found[key] = key if name not in wanted and key in wanted else name
    return found


def _owners(destinations: Mapping[str, str], blocks: Sequence[str]) -> dict[str, str]:
    """By stored name: the block that a tensor is for; those outside are left out."""
    starts = {f"{block}.": block for block in blocks}
    owners = {}
    for key, name in destinations.items():
        block = next((owner for start, owner in starts.items() if name.startswith(start)), None)
        if block is not None:
            owners[key] = block
    return owners


def _portions(stored: StoredTensors, destinations: Mapping[str, str]) -> list[list[str]]:
    """Stored names in portions that are read together: what belongs together, and no more than `PORTION` else."""
    together: dict[str, list[str]] = {}
    for key, name in destinations.items():
        together.setdefault(name, []).append(key)
    found: list[list[str]] = []
    room = 0
    for keys in together.values():
        size = sum(stored.on_meta(key).nbytes for key in keys)
        if not found or size > room:
            found.append([])
            room = PORTION
        found[-1] += keys
        room -= size
    return found


def _tensor(model: nn.Module, name: str) -> Tensor:
    stem, _, key = name.rpartition(".")
    owner = model.get_submodule(stem)
    found: Tensor | None = owner._parameters.get(key)
    if found is None:
        found = owner._buffers.get(key)
    assert found is not None
    return found


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    stem, _, key = name.rpartition(".")
    owner: Any = model.get_submodule(stem)
    held = owner._parameters if key in owner._parameters else owner._buffers
    held[key] = tensor


@contextmanager
def _without_bar() -> Iterator[None]:
    """Transformers shows a bar whenever it fills a model."""
    from transformers import core_model_loading

    module: Any = core_model_loading
    own = module.tqdm
    module.tqdm = lambda steps, **_: steps
    try:
        yield
    finally:
        module.tqdm = own
