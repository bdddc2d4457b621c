"""A machine that has other things to do: times beside processes that compute without end."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from optimum_sab.bench.timing import Call, call_seconds
from optimum_sab.errors import ConfigError, SABError

_BEGUN = "busy"
_ENDLESS = f"print({_BEGUN!r}, flush=True)\nwhile True: pass"


class BusyError(SABError, RuntimeError):
    """A process that was to keep the machine busy does not run."""


@dataclass(frozen=True)
class BusySeconds:
    """Seconds of one call among calls that follow each other.

    Attributes:
        quiet: median without the busy processes, just before.
        median: beside them.
        mean: of the same calls; whoever loses the processor in the middle of one has it back milliseconds later.
    """

    quiet: float
    median: float
    mean: float


def check_busy(processes: int, device: torch.device) -> None:
    """Refuse what cannot be measured.

    Raises:
        ConfigError: the number is negative, or the device is no CPU.
    """
    if processes < 0:
        raise ConfigError(f"--busy {processes} must be 0 or more processes.")
    if processes and device.type != "cpu":
        raise ConfigError(f"--busy {processes} is for times on the CPU, not on {str(device)!r}; use --device cpu.")


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """That many processes compute without end inside the ``with`` block, at this process's own priority.

    Raises:
        BusyError: one does not begin.
    """
    with ExitStack() as ends:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-IS", "-c", _ENDLESS], stdout=subprocess.PIPE)
            ends.callback(process.wait)
            ends.callback(process.kill)
            assert process.stdout is not None
            ends.callback(process.stdout.close)
            if process.stdout.readline() != _BEGUN.encode() + b"\n":
                raise BusyError(
                    f"{sys.executable} ended instead of computing without end; there is nothing to time beside."
                )
        yield


def busy_seconds(sides: Mapping[str, Sequence[Call]], processes: int, repeats: int) -> dict[str, BusySeconds]:
    """Seconds of one call per side, without and with that many other busy processes.

    The calls of a side follow each other, as those of a model's layers do: in turns, each would be timed beside the
    threads that the other one leaves spinning.
    """
    found = {}
    for name, calls in sides.items():
        quiet = _samples(calls, repeats)
        with busy_processes(processes):
            busy = _samples(calls, repeats)
        found[name] = BusySeconds(statistics.median(quiet), statistics.median(busy), statistics.fmean(busy))
    return found


def _samples(calls: Sequence[Call], repeats: int) -> list[float]:
    return [call_seconds(calls[i % len(calls)]) for i in range(-1, repeats)][1:]  # the first one warms up
