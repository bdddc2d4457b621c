"""The safetensors files of a checkpoint: which they are, and what their headers say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from optimum_sab.errors import FormatError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
SAVE_KEY = "sab_weights"  # in a file's metadata: the save it was written by
DIGESTS_KEY = "sab_digests"  # JSON: tensor → digest, for the file's own tensors
LAYERS_KEY = "sab_layers"  # JSON: packed layer → the settings that its stored shapes follow from

_DTYPES = {  # safetensors' spelling → PyTorch's, bytes of an item
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}


@dataclass(frozen=True)
class StoredTensor:
    """Header entry of one tensor: its shape, its dtype in safetensors' spelling, and the file's byte it begins at."""

    shape: tuple[int, ...]
    dtype: str
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype][1]

    @property
    def dtype_name(self) -> str:
        """PyTorch's name for the dtype."""
        return _DTYPES[self.dtype][0]

    @property
    def is_floating(self) -> bool:
        return self.dtype.startswith(("F", "BF"))


@dataclass(frozen=True)
class StoredFile:
    """A safetensors file, from its header.

    Attributes:
        path: of the file.
        tensors: by name.
        save: identity of the save that wrote it; None where it was written without digests.
        digests: of every tensor when it was written; empty without.
        layers: per packed layer of the whole model, by its name from the block list on: the settings its stored shapes
            follow from; empty without digests.
    """

    path: str
    tensors: Mapping[str, StoredTensor]
    save: str | None
    digests: Mapping[str, str]
    layers: Mapping[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        return Path(self.path).name


def local_files(folder: Path) -> list[str]:
    """The safetensors files that Transformers reads of a local folder, in its order of preference.

    Raises:
        FormatError: the index is unreadable or names a file that is not there, or what has a file's name is none.
    """
    if (folder / WEIGHTS).is_file():
        return [str(folder / WEIGHTS)]
    if (folder / INDEX).is_file():
        files = sorted({str(folder / name) for name in read_index(folder / INDEX).values()})
        missing = [file for file in files if not Path(file).is_file()]
        if missing:
            raise FormatError(
                f"{INDEX} names {Path(missing[0]).name!r}, which is not there; fetch the checkpoint again."
            )
        return files
    found = sorted(folder.glob("*.safetensors"))
    for path in found:
        if not path.is_file():  # reading a pipe would wait for somebody to write into it
            raise FormatError(
                f"{str(path)!r} is no file (a folder, a pipe, a link that leads nowhere); fetch the checkpoint again."
            )
    shard = next((path.name for path in found if SHARD.fullmatch(path.name)), None)
    if shard is not None and not any(folder.glob("*.safetensors.index*.json")):
        raise FormatError(
            f"{shard!r} is a part of a checkpoint whose {INDEX} is not there; fetch the checkpoint again."
        )
    return [str(path) for path in found]


def read_index(path: Path) -> dict[str, str]:
    """The index of a sharded checkpoint: tensor → file.

    Raises:
        FormatError: it is unreadable, or no index.
    """
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) and v for v in weight_map.values()):
        raise FormatError(f"{str(path)!r} has no 'weight_map' of tensors to files; it is damaged, fetch it again.")
    return weight_map


def read_json(path: Path) -> Any:
    """A JSON file's content.

    Raises:
        FormatError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path.name!r} of {str(path.parent)!r} cannot be read: {error}") from error


def read_headers(files: Sequence[str]) -> list[StoredFile]:
    """The headers of safetensors files.

    Raises:
        FormatError: a file is truncated or damaged, or two of them hold a tensor of one name.
    """
    stored = [_read_header(str(file)) for file in files]
    owners: dict[str, str] = {}
    for file in stored:
        for name in file.tensors:
            if name in owners:
                raise FormatError(
                    f"tensor {name!r} is in {owners[name]} and in {file.name}; the folder holds files of two saves, "
                    "save or fetch the checkpoint into an empty one."
                )
            owners[name] = file.name
    return stored


def described(tensors: Mapping[str, Tensor]) -> StoredFile:
    """Tensors that are in memory, as if they were a file of a save without digests."""
    spelled = {name: dtype for dtype, (name, _) in _DTYPES.items()}
    entries = {
        name: StoredTensor(tuple(tensor.shape), spelled[str(tensor.dtype).removeprefix("torch.")], 0)
        for name, tensor in tensors.items()
    }
    return StoredFile("state_dict", entries, None, {}, {})


def _read_header(path: str) -> StoredFile:
    try:
        with safe_open(path, framework="pt") as handle:
            opened: Any = handle
            metadata = opened.metadata() or {}
        with open(path, "rb") as file:  # safetensors has checked the header, but does not say where tensors begin
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise FormatError(f"{path} is not there, although the checkpoint's index names it; fetch it again.") from error
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read ({error}); it is truncated or damaged, fetch it again.") from error
    entries.pop("__metadata__", None)
    tensors = {
        name: StoredTensor(tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }
    unknown = next((t.dtype for t in tensors.values() if t.dtype not in _DTYPES), None)
    if unknown is not None:
        raise FormatError(f"{path} holds a tensor of dtype {unknown}, which no packed checkpoint does.")
    save = metadata.get(SAVE_KEY)
    digests = _mapping(path, metadata, DIGESTS_KEY, str) if save is not None else {}
    layers = _mapping(path, metadata, LAYERS_KEY, dict) if save is not None else {}
    return StoredFile(path, tensors, save, digests, layers)


def _mapping(path: str, metadata: Mapping[str, str], key: str, kind: type) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, kind) for value in found.values()):
        raise FormatError(f"{path}: {key!r} in its metadata cannot be read; the file is damaged, fetch it again.")
    return found
