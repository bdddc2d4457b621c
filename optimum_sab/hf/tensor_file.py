"""A safetensors file, written tensor by tensor: the bytes that `safetensors` would write, never held together."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save
from torch import Tensor

from optimum_sab.nn.scratch import give_back

_LENGTH = 8  # bytes that say how long the header is, and of which it is a multiple
_STEP = 2**26  # bytes that are written at a time


def write_tensors(tensors: Mapping[str, Tensor], filename: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write a file as `safetensors.torch.save_file` does, but for metadata, which are sorted by name.

    safetensors writes them in the order of a hash table, another every time; so the same content gives the same file.
    The pages of tensors that lie in scratch files are given back as soon as they are written.

    Args:
        tensors: by name, dense, on any device but meta.
        filename: replaced where it is there, when all is written.
        metadata: of the file.

    Raises:
        OSError: it cannot be written.
    """
    header, names, _ = _header(tensors, metadata)
    with _replacing(Path(filename)) as file:
        file.write(header)
        for name in names:
            content = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8)
            for part in content.split(_STEP):
                file.write(part.cpu().numpy().data)
                give_back(tensors[name])


def write_holes(tensors: Mapping[str, Tensor], filename: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write the file of these tensors' names, dtypes and shapes, with a hole for values: zeros that take no room on
    most disks.

    Args: those of `write_tensors`, but that tensors may be on meta.

    Raises:
        OSError: it cannot be written.
    """
    header, _, size = _header(tensors, metadata)
    with _replacing(Path(filename)) as file:
        file.write(header)
        file.truncate(len(header) + size)


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str], int]:
    """The file up to the values, the tensors' names in the order of these, and how many bytes they take."""
    spelled = _spelled(tensor.dtype for tensor in tensors.values())
    order = {dtype: place for place, dtype in enumerate(spelled)}
    names = sorted(tensors, key=lambda name: (order[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": spelled[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-len(written) % _LENGTH)
    return len(written).to_bytes(_LENGTH, "little") + written, names, end


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name at the end, as safetensors does it: what is written may be mapped from the old one."""
    beside = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        with open(beside, "xb") as file:  # with the permissions that any new file has, as config.json beside it
            yield file
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _spelled(dtypes: Iterable[torch.dtype]) -> dict[torch.dtype, str]:
    """safetensors' names for dtypes, in the order in which it lays out their tensors."""
    kinds = {str(dtype): dtype for dtype in dtypes}
    raw = save({name: torch.zeros(1, dtype=dtype) for name, dtype in kinds.items()})
    header = json.loads(raw[_LENGTH : _LENGTH + int.from_bytes(raw[:_LENGTH], "little")])
    laid = sorted(kinds, key=lambda name: header[name]["data_offsets"])
    return {kinds[name]: header[name]["dtype"] for name in laid}
