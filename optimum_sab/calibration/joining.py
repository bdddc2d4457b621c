"""How a process joins the others of its run: who they are, and for how long each is waited for."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from optimum_sab.calibration.joined_ranks import JoinedRanks, first_sentence
from optimum_sab.calibration.ranks import Ranks
from optimum_sab.errors import ConfigError, RankError, SABWarning

TIMEOUT = "OPTIMUM_SAB_RANK_TIMEOUT"
SECONDS = 3600.0  # that a rank is waited for: one may be solving the widest linear, or still be loading
_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
_CURRENT: ContextVar[Ranks | None] = ContextVar("ranks", default=None)
_JOINED = itertools.count()  # times that this process has joined others: theirs is the same


def launched() -> tuple[int, int]:
    """This process's rank and how many there are: by the process group that is there, or else the launcher's variables.

    Raises:
        ConfigError: the variables are no numbers that go together.
    """
    if not dist.is_available():
        return 0, 1
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    given = [os.environ.get(name) for name in _LAUNCHER]
    if None in given:
        return 0, 1
    try:
        rank, size = int(given[0] or ""), int(given[1] or "")
    except ValueError:
        rank, size = -1, 0
    if not 0 <= rank < size:
        raise ConfigError(
            f"RANK={given[0]!r} and WORLD_SIZE={given[1]!r} do not say which of how many processes this is; start them "
            "with torchrun, or unset both for a run of one process."
        )
    return rank, size


def timeout() -> float:
    """Seconds that a rank is waited for.

    Raises:
        ConfigError: the variable holds no number above 0.
    """
    given = os.environ.get(TIMEOUT)
    try:
        seconds = SECONDS if given is None else float(given)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < 10**8:
        raise ConfigError(f"{TIMEOUT}={given!r} must be seconds above 0, such as 600.")
    return seconds


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes of this run for as long as the context is open; inside of another such context, its ranks.

    What is raised inside is told to the other ranks. On all but the first, warnings of ours are not shown.

    Raises:
        ConfigError: see `launched` and `timeout`.
        RankError: the others do not come.
    """
    current = _CURRENT.get()
    if current is not None:
        yield current
        return
    if launched()[1] == 1:
        yield Ranks()
        return
    with _connected() as ranks, warnings.catch_warnings():
        if not ranks.first:
            warnings.simplefilter("ignore", SABWarning)
        token = _CURRENT.set(ranks)
        try:
            with ranks.telling():
                yield ranks
        finally:
            _CURRENT.reset(token)


@contextmanager
def _connected() -> Iterator[JoinedRanks]:
    """A group of our own: of the caller's processes, or where the caller has joined none, of the launcher's."""
    rank, size = launched()
    wait = timedelta(seconds=timeout())
    prefix = f"optimum-sab-{next(_JOINED)}"
    ours = not dist.is_initialized()
    try:
        if ours:
            found, _, _ = next(dist.rendezvous("env://", timeout=wait))
            store = dist.PrefixStore(prefix, found)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
            group: Any = dist.group.WORLD
        else:
            store = dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
            group = dist.new_group(backend="gloo", timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {rank} of {size} does not reach the others ({first_sentence(error)}); every process has to make the "
            f"same call, and is waited for {wait.total_seconds():g} seconds ({TIMEOUT})."
        ) from error
    try:
        yield JoinedRanks(group, store, wait)
    finally:
        with suppress(RuntimeError, ValueError):  # of connections that are gone already
            dist.destroy_process_group(None if ours else group)
