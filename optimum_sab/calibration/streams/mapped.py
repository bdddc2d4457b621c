"""Activations of waiting samples beyond a budget lie in memory-mapped files, which the system writes out when it must.

What a coroutine holds when it stops is known from what was computed in it: every tensor that is made there is noted, by
a weak reference. Their storages are replaced under them, so no code of a model is touched, and no value changes.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optimum_sab.errors import CalibrationError
from optimum_sab.nn.scratch import reserve

SMALL = 2**14  # bytes of a tensor that is not worth a file
Made = list["weakref.ref[Tensor]"]


class MappedActivations:
    """Keeps within a budget what samples hold while they wait.

    Args:
        room: bytes that may stay in memory, all samples together.
        folder: where the files lie; None for the system's folder for temporary files. They have no name, so nothing is
            left of them whatever happens.
    """

    def __init__(self, room: int, folder: str | os.PathLike[str] | None = None) -> None:
        self._room = room
        self._folder = Path(tempfile.gettempdir() if folder is None else folder)
        self._made: dict[Hashable, Made] = {}
        self._held: dict[Hashable, int] = {}
        self.mapped = 0  # bytes so far

    @contextmanager
    def going_on(self, worker: Hashable, given: Callable[[], Any]) -> Iterator[None]:
        """Inside, the worker computes; at the end it waits, or is over.

        Args:
            worker: its name.
            given: asked at the end for further tensors that it holds, in dicts, lists and tuples.
        """
        made = self._made.setdefault(worker, [])
        with _Noting(made):
            yield
        _note(made, given())
        made[:] = [each for each in made if each() is not None]
        self._held.pop(worker, None)
        storages = _in_memory(made)
        own = sum(tensors[0].untyped_storage().nbytes() for tensors in storages)
        if sum(self._held.values()) + own > self._room:
            own -= sum(map(self._map, storages))
        self._held[worker] = own

    @torch.no_grad()
    def _map(self, tensors: list[Tensor]) -> int:
        """Let tensors of one storage lie in a file; returns its bytes, or 0 where it stays."""
        old = tensors[0].untyped_storage()
        users = torch._C._storage_Use_Count(old._cdata) - 1  # but for this reference
        if users != len(tensors) or any(each.is_conj() or each.is_neg() for each in tensors):  # values by a flag
            return 0
        new = self._file(old.nbytes())
        new.copy_(old)
        for tensor in tensors:
            there = torch.empty(0, dtype=tensor.dtype)
            there.set_(new, tensor.storage_offset(), tensor.size(), tensor.stride())
            tensor.data = there  # which is no change to a graph that has saved it
        self.mapped += new.nbytes()
        return int(new.nbytes())

    def _file(self, size: int) -> torch.UntypedStorage:
        try:
            with tempfile.TemporaryFile(prefix=".optimum-sab-activations-", dir=self._folder) as file:
                reserve(file.fileno(), size)  # a disk that is full says so here, and not by a signal later
                found: Any = torch.UntypedStorage.from_file(f"/dev/fd/{file.fileno()}", True, size)
        except (OSError, RuntimeError) as error:
            raise CalibrationError(
                f"activations do not find room in {str(self._folder)!r} ({error}); free some, name another disk by "
                "TMPDIR, raise activation_memory, or give fewer or shorter samples."
            ) from error
        assert isinstance(found, torch.UntypedStorage)
        return found


@dataclass(frozen=True)
class Place:
    """Where samples go through blocks.

    Attributes:
        device: where blocks are moved while they are worked on; None leaves them where they are.
        mapped: what bounds the memory of samples that wait; None for no bound.
    """

    device: torch.device | None = None
    mapped: MappedActivations | None = None


class _Noting(TorchDispatchMode):
    """Notes every tensor on the CPU that is made."""

    def __init__(self, made: Made) -> None:
        super().__init__()
        self._made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        _note(self._made, found)
        return found


def _note(made: Made, tree: Any) -> None:
    for each in tree_leaves(tree):
        if type(each) is Tensor and each.device.type == "cpu":
            made.append(weakref.ref(each))


def _in_memory(made: Made) -> list[list[Tensor]]:
    """The tensors that are still there, by their storage, of those that are large and in no file yet."""
    found: dict[int, dict[int, Tensor]] = {}
    for reference in made:
        tensor = reference()
        if tensor is not None and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage.nbytes() >= SMALL and storage.filename is None:
                found.setdefault(storage._cdata, {})[id(tensor)] = tensor
    return [list(tensors.values()) for tensors in found.values()]
