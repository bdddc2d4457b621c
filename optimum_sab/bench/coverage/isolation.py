"""A process of its own for every half of a trial, with limits on its time and memory.

The processes are forked from a server that has imported everything and has seen no model, so that each begins at once.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from optimum_sab.bench.coverage import trial
from optimum_sab.bench.coverage.families import Family
from optimum_sab.bench.coverage.outcome import FAILED, NOT_BUILT, Outcome
from optimum_sab.errors import ConfigError

PATIENCE = 5
CONTEXT: Any = multiprocessing.get_context("forkserver" if sys.platform.startswith("linux") else None)
_FIELDS = {each.name for each in fields(Outcome)} - {"family"}


@dataclass(frozen=True)
class Limits:
    """What a family may take.

    Attributes:
        seconds: of computing, for each half of a trial; on the clock it may take `PATIENCE` times as long, since other
            work may go on beside it.
        gigabytes: of memory beyond what the imports take.
        jobs: families at a time.
    """

    seconds: float = 120.0
    gigabytes: float = 6.0
    jobs: int = 1


def try_families(families: Sequence[Family], limits: Limits) -> Iterator[Outcome]:
    """Each family's outcome as soon as it is known.

    Args:
        families: what is tried.
        limits: on each.

    Raises:
        ConfigError: a limit is not above 0, or the system has no processes to fork.
    """
    if limits.jobs < 1 or limits.seconds <= 0 or limits.gigabytes <= 0:
        raise ConfigError(f"{limits} must be above 0: at least one job, some seconds and some gigabytes.")
    if not sys.platform.startswith("linux"):
        raise ConfigError(f"limits on a family's memory need Linux, and this is {sys.platform}.")
    CONTEXT.set_forkserver_preload([trial.__name__])
    with ThreadPoolExecutor(limits.jobs) as pool:
        waiting = [pool.submit(try_family, family, limits) for family in families]
        for each in as_completed(waiting):
            yield each.result()


def try_family(family: Family, limits: Limits) -> Outcome:
    """One family, in two processes one after the other."""
    with tempfile.TemporaryDirectory(prefix="sab-coverage-") as name:
        folder = Path(name)
        for half in (trial.quantize, trial.use):
            ended = run_limited(half, (family, folder), limits, folder / "log.txt")
            notes = trial.Notes(folder)
            if ended is not None and "outcome" not in notes.known:
                stage = notes.known.get("stage", "")
                notes.note(outcome=NOT_BUILT if stage in ("build", "dense") else FAILED, reason=ended)
            if "outcome" in notes.known:
                break
        return outcome_of(family, notes.known)


def outcome_of(family: Family, known: dict[str, Any]) -> Outcome:
    """The row of what was written down."""
    found: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
    return Outcome(family.name, **{key: value for key, value in found.items() if key in _FIELDS})


def run_limited(work: Callable[..., None], arguments: tuple[Any, ...], limits: Limits, log: Path) -> str | None:
    """Run in a process of its own; what ended it, or None where it came to its end.

    Args:
        work: a function of a module.
        arguments: that can be pickled.
        limits: on this process.
        log: takes what it prints.
    """
    process = CONTEXT.Process(target=_limited, args=(work, arguments, limits, str(log)), daemon=True)
    process.start()
    process.join(PATIENCE * limits.seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return f"over its time of {limits.seconds:g} s"
    if process.exitcode == -signal.SIGXCPU:
        return f"over its time of {limits.seconds:g} s"
    if process.exitcode:
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return f"its process ended with status {process.exitcode}" + (f": {lines[-1]}" if lines else "")
    return None


def _limited(work: Callable[..., None], arguments: tuple[Any, ...], limits: Limits, log: str) -> None:
    import resource

    import torch

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(handle, stream.fileno())
    torch.set_num_threads(1)
    limit_memory(limits.gigabytes)
    limit_time(limits.seconds)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    work(*arguments)


def limit_time(seconds: float) -> None:
    """No more seconds of computing than this beyond what the process has taken."""
    import resource  # which Windows has not

    most = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (most, most + 5))


def limit_memory(gigabytes: float) -> None:
    """No more address space than this beyond what the process has."""
    import resource  # which Windows has not

    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
