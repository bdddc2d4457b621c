"""Several processes in one run, by torch.distributed: the only place where they speak to each other. How they come
together is in `joining`.

Every step begins with an exchange in which each rank says where it is, or that it has failed and why. So a rank that
raises comes to the next exchange once more and all stop with what it said, and a rank that does something else is named
instead of waited for. Tensors travel right behind an exchange, when all are known to be there. A rank that dies closes
its connections, which the others see at once; one that is silent is given up after `joining.timeout`.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from optimum_sab.calibration.last_words import last_words, leave_words
from optimum_sab.calibration.ranks import Ranks
from optimum_sab.errors import RankError

T = TypeVar("T")


@dataclass(frozen=True)
class _Word:
    """What a rank says in an exchange."""

    at: str
    value: Any = None
    failure: str | None = None


class JoinedRanks(Ranks):
    """`Ranks` of a process group.

    Args:
        group: gloo.
        store: all ranks', for last words.
        wait: how long a rank is waited for.
    """

    def __init__(self, group: Any, store: Any, wait: timedelta) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group, self._store, self._wait = group, store, wait
        self._devices: Any = None  # the group in which tensors of accelerators travel
        self._speaking = False  # inside of a collective: whoever fails there cannot come to another
        host = socket.gethostname()
        self._local = self.exchange("joining", host)[: self.rank].count(host)  # ranks before this on its machine

    # -- what ranks say --------------------------------------------------------------------------------------------

    def exchange(self, at: str, value: T) -> list[T]:
        words = self._meet(_Word(at, value))
        for rank, word in enumerate(words):
            if word.failure is not None:
                raise RankError(f"rank {rank} of {self.size} has stopped: {word.failure}", told=True)
        for rank, word in enumerate(words):
            if word.at != words[0].at:
                raise RankError(
                    f"rank {rank} is at {word.at!r} and rank 0 at {words[0].at!r}; every process has to make the same "
                    "call with the same settings.",
                    told=True,
                )
        return [word.value for word in words]

    def give(self, at: str, owner: int, make: Callable[[], T]) -> T:
        made: list[T] = []
        blob = torch.empty(0, dtype=torch.uint8)
        if self.rank == owner:
            made.append(make())
            blob = _stored(made[0])
        length = self.exchange(at, blob.numel())[owner]
        with self._speaks(at):
            if self.rank != owner:
                blob = torch.empty(length, dtype=torch.uint8)
            dist.broadcast(blob, self._of(owner), group=self._group)
        self.wire_bytes += length * (self.size - 1)
        return made[0] if made else _read(blob)

    def gather(self, at: str, value: T) -> list[T]:
        blob = _stored(value)
        lengths = self.exchange(at, blob.numel())
        found = [value] if self.first else []
        for rank in range(1, self.size):
            with self._speaks(at):
                if self.first:
                    blob = torch.empty(lengths[rank], dtype=torch.uint8)
                    dist.recv(blob, self._of(rank), group=self._group)
                    found.append(_read(blob))
                elif self.rank == rank:
                    dist.send(blob, self._of(0), group=self._group)
        self.wire_bytes += sum(lengths[1:])
        return found

    def sum_to(self, owner: int | None, tensor: Tensor) -> None:
        times = (self.size - 1) * (2 if owner is None else 1)
        self.wire_bytes += tensor.numel() * tensor.element_size() * times
        on_device = tensor.device.type != "cpu" and self._devices is not None
        sums = tensor.contiguous() if on_device else tensor.cpu().contiguous()
        group = self._devices if on_device else self._group
        with self._speaks("sums"):
            if owner is None:
                dist.all_reduce(sums, group=group)
            else:
                dist.reduce(sums, self._of(owner), group=group)
        if sums is not tensor and (owner is None or self.rank == owner):
            tensor.copy_(sums)

    def device(self, device: torch.device | None) -> torch.device | None:
        if device is None or device.type == "cpu":
            return device
        if str(device) == "cuda":
            local = int(os.environ.get("LOCAL_RANK", self._local))
            device = torch.device("cuda", local % torch.cuda.device_count())
        places = set(self.exchange("devices", (socket.gethostname(), str(device))))
        if device.type == "cuda" and len(places) == self.size and dist.is_nccl_available():
            self._devices = dist.new_group(backend="nccl", timeout=self._wait)
        return device

    # -- failures --------------------------------------------------------------------------------------------------

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the others what is raised inside."""
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            error.told = self._tell(f"{type(error).__name__}: {error}")  # type: ignore[attr-defined]
            raise

    def _tell(self, failure: str) -> bool:
        """Whether the others have heard it."""
        if self._speaking:  # the others are in the middle of something else: they see that this one is gone
            leave_words(self._store, self.rank, failure)
            return False
        try:
            self._meet(_Word("", failure=failure))
        except RankError:  # they may have failed too
            return False
        return True

    def _meet(self, word: _Word) -> list[_Word]:
        mine = torch.frombuffer(bytearray(pickle.dumps(word)), dtype=torch.uint8)
        with self._speaks(word.at):
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([mine.numel()]), group=self._group)
            most = max(int(each) for each in lengths)
            blobs = [torch.empty(most, dtype=torch.uint8) for _ in range(self.size)]
            padded = torch.nn.functional.pad(mine, (0, most - mine.numel()))
            dist.all_gather(blobs, padded, group=self._group)
        self.wire_bytes += (most + 8) * self.size * (self.size - 1)
        return [pickle.loads(bytes(blob[: int(n)].numpy())) for blob, n in zip(blobs, lengths, strict=True)]

    @contextmanager
    def _speaks(self, at: str) -> Iterator[None]:
        self._speaking = True
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RankError(self._lost(at, error)) from error
        self._speaking = False

    def _lost(self, at: str, error: Exception) -> str:
        """Who is gone: whoever is still there says so, for a few seconds."""
        missing, said = last_words(self._store, self.rank, self.size)
        if said is not None:
            return f"rank {said[0]} of {self.size} has stopped: {said[1]}"
        names = ", ".join(map(str, missing))
        who = f"rank {names} of {self.size} does not answer" if missing else "the connection between the ranks broke"
        return (
            f"{who} (killed, out of memory, stopped, or its machine or the network is down): nothing came at {at!r} "
            f"({first_sentence(error)}). What is finished is kept in the resume folder, if there is one; start all "
            "again."
        )

    def _of(self, rank: int) -> int:
        return dist.get_global_rank(self._group, rank)


def _stored(value: Any) -> Tensor:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)


def _read(blob: Tensor) -> Any:
    return torch.load(io.BytesIO(blob.numpy().data), map_location="cpu", weights_only=False)


def first_sentence(error: Exception) -> str:
    """The first sentence of what torch says, without its place in the source."""
    line = str(error).partition("\n")[0]
    return re.sub(r"^\[[^\]]*\]\s*", "", line).partition(". ")[0][:200].rstrip(".")
