"""Which code computes with packed weights on which device, and why: the one place that decides it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from optimum_sab.errors import ConfigError, warn
from optimum_sab.presets import BACKENDS as BACKENDS
from optimum_sab.wording import did_you_mean

ENVIRONMENT = "OPTIMUM_SAB_BACKEND"

_forced: ContextVar[str | None] = ContextVar("forced_backend", default=None)
_warned: set[str] = set()


@dataclass(frozen=True)
class BackendChoice:
    """What computes, the reason in words, and whether somebody asked for it."""

    name: str
    reason: str
    forced: bool = False


@contextmanager
def force_backend(name: str | None) -> Iterator[None]:
    """Compute with this backend inside the ``with`` block; None or "auto" leaves the choice to the device.

    Raises:
        ConfigError: there is no backend of that name.
    """
    token = _forced.set(_known(name, "force_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def backend_name(device: torch.device, forced: str | None = None) -> str:
    """Name of `choose_backend`'s choice. Warns once where it is the reference for want of something better."""
    if device.type == "cpu" and cpu_may_compute(forced) and _cpu_problem("cpu") is None:
        return "cpu"
    choice = choose_backend(device, forced)
    if choice.name == "reference" and not choice.forced and choice.reason not in _warned:
        _warned.add(choice.reason)
        warn(f"packed layers on {device.type} are computed by the slow reference: {choice.reason}.")
    return choice.name


def choose_backend(device: torch.device, forced: str | None = None) -> BackendChoice:
    """The backend for packed layers on ``device``.

    Triton kernels on accelerators, compiled C on the CPU, the reference elsewhere. Forced, in this order, by
    ``forced``, `force_backend`, and the environment variable ``OPTIMUM_SAB_BACKEND``.

    Raises:
        ConfigError: the forced backend has an unknown name or cannot be used here; the message has the reason.
    """
    for name, origin in (
        (_known(forced, "backend"), f"backend={forced!r}"),
        (_forced.get(), "force_backend"),
        (_known(os.environ.get(ENVIRONMENT), ENVIRONMENT), ENVIRONMENT),
    ):
        if name is not None:
            problem = why_not(name, device)
            if problem is not None:
                raise ConfigError(f"{origin} asks for backend {name!r} on {device.type}, but {problem}.")
            return BackendChoice(name, f"forced by {origin}", forced=True)
    best = "cpu" if device.type == "cpu" else "triton"
    problem = why_not(best, device)
    return BackendChoice("reference", problem) if problem else BackendChoice(best, _MERIT[best])


def cpu_may_compute(forced: str | None = None) -> bool:
    """Whether nobody asks for another backend than the compiled C kernels for layers on the CPU; no more than that.

    For calls that cannot wait for `choose_backend`. Where it is false, that one has the choice and the message.
    """
    if forced in _OPEN:
        forced = _forced.get()
        if forced is None and _KEY in _RAW:
            forced = os.environ.get(ENVIRONMENT)
    return forced in _OPEN or forced == "cpu"


_OPEN = (None, "", "auto")
# Where a variable is not set, `os.environ.get` raises and catches two errors, which takes a microsecond.
_RAW: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
_KEY: Any = ENVIRONMENT if _RAW is os.environ else os.environ.encodekey(ENVIRONMENT)
_MERIT = {"triton": "Triton kernels run on this device and agree with the reference", "cpu": "compiled C kernels"}


def why_not(name: str, device: torch.device) -> str | None:
    """Why a backend cannot be used on ``device``, as the end of a sentence; None where it can."""
    if name == "reference":
        return None
    return _cpu_problem(device.type) if name == "cpu" else _triton_problem(device)


def _cpu_problem(kind: str) -> str | None:
    if kind != "cpu":
        return "it computes on the CPU only"
    from optimum_sab.ops.cpu.compiler import availability

    found = availability()
    return None if found.usable else found.reason


@cache
def _triton_problem(device: torch.device) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels need a GPU; set TRITON_INTERPRET=1 to debug them on the CPU"
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"Triton has no kernels for {device.type} devices"
    from optimum_sab.ops.verification import disagreement

    return disagreement(device)


def _known(name: str | None, origin: str) -> str | None:
    if name in _OPEN:
        return None
    if name not in BACKENDS:
        known = ("auto", *BACKENDS)
        hint = did_you_mean(str(name), known)
        raise ConfigError(f"{origin}={name!r} is no backend; use one of {', '.join(known)}{hint}")
    return name
