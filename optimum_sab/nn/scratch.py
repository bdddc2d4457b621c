"""Tensors that lie in memory-mapped files without a name: what is not in use takes no memory.

The files are shared mappings whose room on the disk is reserved before a byte is written, so a full disk is an error
and not a signal. Pages that were used can be given back (`give_back`) without losing what is in them: they are then the
system's, which writes them out when it needs the room, and come again when somebody reads.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from optimum_sab.errors import StreamError

_ALIGNMENT = 64  # bytes at which tensors begin in a file
_STEP = 2**26  # bytes that are copied before their pages are given back
_ROUND = 16  # bytes: a multiple of every dtype's


class _Mapping(mmap.mmap):
    """A mapped file that lives as long as a tensor in it."""

    handle: int


@dataclass(frozen=True)
class _Place:
    """Where a storage lies."""

    mapping: weakref.ref[_Mapping]
    offset: int


_PLACES: dict[int, _Place] = {}  # by a storage's address; what is no more in memory has gone from here
_STAYS_SHARED: ContextVar[bool] = ContextVar("stays_shared", default=False)


def reserve(handle: int, size: int) -> None:
    """Make an open file so large that all of it has room on the disk.

    Raises:
        OSError: it has not.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)


class Scratch:
    """Files for tensors that are not always in use.

    Args:
        folder: where they lie, made if it is not there; None for the system's folder for temporary files. They have no
            name, so nothing is left of them whatever happens.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = Path(tempfile.gettempdir() if folder is None else folder)
        self._mappings: weakref.WeakSet[_Mapping] = weakref.WeakSet()

    @torch.no_grad()
    def put(self, tensors: Iterable[Tensor]) -> None:
        """Let tensors lie in a file of their own from now on; what is on another device, or in a file, stays there.

        Those that share memory with each other still do. Nobody who has the tensors notices, but by their addresses.

        Raises:
            StreamError: they find no room there. All are where they were then.
        """
        pieces = _pieces(tensors)
        if not pieces:
            return
        starts, size = [], 0
        for piece in pieces:
            starts.append(size)
            size += -(-piece.size // _ALIGNMENT) * _ALIGNMENT
        mapping = self._mapped(size)
        for piece, start in zip(pieces, starts, strict=True):
            piece.copy_to(_bytes(mapping, start, piece.size), mapping)
            piece.move_to(_storage(mapping, start, piece.size))
        _unused(mapping)

    def give_back(self) -> None:
        """The pages of all files are the system's again."""
        for mapping in list(self._mappings):
            _unused(mapping)

    def _mapped(self, size: int) -> _Mapping:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(prefix=".optimum-sab-scratch-", dir=self._folder) as file:
                reserve(file.fileno(), size)
                mapping = _Mapping(file.fileno(), size)
                mapping.handle = os.dup(file.fileno())
        except (OSError, ValueError) as error:
            raise StreamError(
                f"{size / 1e9:.3g} GB of weights do not find room in {str(self._folder)!r} ({error}); free some, or "
                "name another disk by resume_folder or TMPDIR. With a resume_folder, finished blocks are not lost."
            ) from error
        weakref.finalize(mapping, os.close, mapping.handle)
        self._mappings.add(mapping)
        return mapping


def give_back(tensor: Tensor) -> None:
    """The pages of the file that a tensor lies in are the system's again; nothing is done where it lies in none."""
    found = _mapping_of(tensor)
    if found is not None:
        _unused(found)


def in_scratch(tensor: Tensor) -> bool:
    """Whether a tensor lies in a file whose pages can be given back."""
    return _mapping_of(tensor) is not None


def apart(tensor: Tensor) -> Tensor:
    """The same memory, as a tensor that has a storage of its own; where it lies in a file, its pages can be given back.

    Args:
        tensor: dense and contiguous, on any device but meta; it may be a view of a larger one.
    """
    found = _mapping_of(tensor)
    if found is None:
        return from_dlpack(tensor.detach())
    storage = tensor.untyped_storage()
    start = _PLACES[storage.data_ptr()].offset + int(tensor.storage_offset()) * tensor.element_size()
    moved = torch.empty(0, dtype=tensor.dtype)
    return moved.set_(_storage(found, start, tensor.nbytes), 0, tensor.size(), tensor.stride())


@contextmanager
def staying_shared() -> Iterator[None]:
    """Inside, `make_private` does nothing: for who saves a model and has no other use for it."""
    token = _STAYS_SHARED.set(True)
    try:
        yield
    finally:
        _STAYS_SHARED.reset(token)


@torch.no_grad()
def make_private(tensors: Iterable[Tensor]) -> None:
    """Let tensors in files be as those of a checkpoint that was mapped: what is written to them is the process's own.

    So a forked process has its own, too. Their pages cannot be given back any more; those that nobody has written to
    are the system's to take all the same.
    """
    if _STAYS_SHARED.get():
        return
    lying: dict[int, tuple[_Mapping, list[Tensor]]] = {}
    for tensor in tensors:
        found = _mapping_of(tensor)
        if found is not None:
            lying.setdefault(id(found), (found, []))[1].append(tensor)
    while lying:  # one by one, so that open files do not become more
        _lay_privately(*lying.popitem()[1])


def _lay_privately(mapping: _Mapping, tensors: Iterable[Tensor]) -> None:
    private = _privately(mapping)
    storages: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        own = tensor.untyped_storage()
        if own.data_ptr() not in storages:
            offset = _PLACES[own.data_ptr()].offset
            content = torch.frombuffer(private, dtype=torch.uint8, count=own.nbytes(), offset=offset)
            storages[own.data_ptr()] = content.untyped_storage()
        _lay(tensor, storages[own.data_ptr()], int(tensor.storage_offset()))


def _privately(mapping: _Mapping) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(mapping.handle, len(mapping), access=mmap.ACCESS_COPY)
    return mmap.mmap(mapping.handle, len(mapping), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


@dataclass
class _Piece:
    """Bytes of one storage, and the tensors that lie in them."""

    storage: torch.UntypedStorage
    start: int
    end: int
    tensors: list[Tensor]

    @property
    def size(self) -> int:
        return self.end - self.start

    def copy_to(self, content: Tensor, mapping: _Mapping) -> None:
        """Step by step, so that no more is in memory twice."""
        old = torch.empty(0, dtype=torch.uint8).set_(self.storage, self.start, (self.size,), (1,))
        for begin in range(0, self.size, _STEP):
            content[begin : begin + _STEP].copy_(old[begin : begin + _STEP])
            _unused(mapping)

    def move_to(self, storage: torch.UntypedStorage) -> None:
        for tensor in self.tensors:
            _lay(tensor, storage, int(tensor.storage_offset()) - self.start // tensor.element_size())


def _pieces(tensors: Iterable[Tensor]) -> list[_Piece]:
    """What tensors take of their storages, those that overlap in one piece; without those that are in files."""
    spans: dict[int, list[tuple[int, int, Tensor]]] = {}
    seen: set[int] = set()
    for tensor in tensors:
        movable = tensor.device.type == "cpu" and tensor.layout is torch.strided and tensor.numel()
        if movable and id(tensor) not in seen and not in_scratch(tensor):
            seen.add(id(tensor))
            start = int(tensor.storage_offset()) * tensor.element_size()
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            end = start + (last + 1) * tensor.element_size()
            spans.setdefault(tensor.untyped_storage()._cdata, []).append((start // _ROUND * _ROUND, end, tensor))
    found: list[_Piece] = []
    for some in spans.values():
        storage, before = some[0][2].untyped_storage(), len(found)
        for start, end, tensor in sorted(some, key=lambda span: span[:2]):
            if len(found) > before and start < found[-1].end:
                found[-1].end = max(end, found[-1].end)
                found[-1].tensors.append(tensor)
            else:
                found.append(_Piece(storage, start, end, [tensor]))
    return found


def _bytes(mapping: _Mapping, start: int, size: int) -> Tensor:
    return torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=start)


def _storage(mapping: _Mapping, start: int, size: int) -> torch.UntypedStorage:
    """A storage of its own, noted by its address for as long as the file is mapped."""
    storage = _bytes(mapping, start, size).untyped_storage()
    address = storage.data_ptr()
    _PLACES[address] = _Place(weakref.ref(mapping, lambda _: _PLACES.pop(address, None)), start)
    return storage


def _lay(tensor: Tensor, storage: torch.UntypedStorage, offset: int) -> None:
    moved = torch.empty(0, dtype=tensor.dtype).set_(storage, offset, tensor.size(), tensor.stride())
    tensor.data = moved


def _mapping_of(tensor: Tensor) -> _Mapping | None:
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return None
    place = _PLACES.get(tensor.untyped_storage().data_ptr())
    return None if place is None else place.mapping()


def _unused(mapping: _Mapping) -> None:
    if hasattr(mapping, "madvise") and hasattr(mmap, "MADV_DONTNEED"):  # elsewhere the system takes them when it must
        mapping.madvise(mmap.MADV_DONTNEED)
