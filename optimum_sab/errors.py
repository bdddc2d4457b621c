"""Every error the package raises on purpose, and its warnings: each names the value and what to do about it."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Whoever is inside of these did not write the line that a warning is about.
_NOT_THE_USERS = (
    "optimum_sab",
    "sab_kernels",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "contextlib",
    "functools",
)


class SABError(Exception):
    """Root of the package's errors."""


class ConfigError(SABError, ValueError):
    """A setting, a module rule or a command-line value cannot be used."""


class CalibrationError(SABError, RuntimeError):
    """The calibration pass cannot go on."""


class SampleError(CalibrationError, ValueError):
    """A calibration sample is missing, unreadable, or does not hold what its text refers to."""


class NonFiniteError(CalibrationError):
    """A weight or an activation holds NaN or inf; the message names the module."""


class SingularHessianError(CalibrationError):
    """A Hessian has no Cholesky factor even after the damping was raised."""


class LockstepError(CalibrationError):
    """Samples do not go through the model's linears in one common order."""


class RankError(CalibrationError):
    """Another process of the run has failed, is gone, or does something else; the message says which.

    Args:
        message: see above.
        told: every rank says the same.
    """

    def __init__(self, message: str, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


class FormatError(SABError, ValueError):
    """A packed checkpoint or a packed tensor does not follow the format."""


class FormatVersionError(FormatError):
    """The checkpoint was written in a format version that this release cannot read."""


class StreamError(FormatError):
    """Streamed weights find no room in scratch files, or do not come from their own: one is gone or has changed."""


class OutputExistsError(SABError, FileExistsError):
    """The output directory holds files and the caller did not ask to overwrite them."""


class OutputError(SABError, OSError):
    """Nothing can be written where it was asked for; the message says where a finished checkpoint is instead."""


class ReportError(SABError, ValueError):
    """There is no report where one was looked for, or it is not one that this release reads."""


class MissingDependencyError(SABError, ImportError):
    """An optional package is needed for what was asked; the message names the extra to install."""


class SABWarning(UserWarning):
    """Something the user should know although the work goes on."""


class _Listeners(threading.local):
    """Of one thread; the coroutines of a calibration share theirs."""

    def __init__(self) -> None:
        self.lists: list[list[str]] = []


_LISTENERS = _Listeners()


@contextmanager
def warnings_heard() -> Iterator[list[str]]:
    """Inside, what this thread is warned of is written down too, whatever filters say; each message is told once."""
    heard: list[str] = []
    _LISTENERS.lists.append(heard)
    try:
        yield heard
    finally:
        _LISTENERS.lists = [each for each in _LISTENERS.lists if each is not heard]


def warn(message: str) -> None:
    """Warn with `SABWarning`, and point at the line outside of this package and of those it works in that led here."""
    lists = _LISTENERS.lists
    if lists and message in lists[-1]:
        return
    for heard in lists:
        if message not in heard:
            heard.append(message)
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        SABWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )
