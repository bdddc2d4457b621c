"""Devices that a user names: whether this machine has them."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from optimum_sab.errors import ConfigError, MissingDependencyError

SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")  # Transformers finds the devices itself
_NO_DEVICES = ("disk", "meta")  # what may become of these is for others to say


def usable_device(setting: str, name: Any) -> torch.device:
    """The device of this name or number, tried.

    Args:
        setting: what it was given as, for the error.
        name: as `torch.device` takes it.

    Raises:
        ConfigError: it is no device, or this machine has none of the kind.
    """
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it keeps no values")
        return device
    except (RuntimeError, AssertionError, TypeError) as error:  # torch asserts that it was built for the kind of device
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        kinds = f"cuda:0 to cuda:{n - 1}" if (n := torch.cuda.device_count()) else "no CUDA device"
        raise ConfigError(
            f"{setting}={str(name)!r} cannot be used here ({reason}); torch sees the cpu and "
            f"{kinds}. Name one of those, or leave it out."
        ) from error


def planned_device(setting: str, name: Any) -> torch.device:
    """The device of this name or number, which need not be this machine's.

    Args:
        setting: what it was given as, for the error.
        name: as `torch.device` takes it.

    Raises:
        ConfigError: it is no device.
    """
    try:
        device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
    except (RuntimeError, TypeError):
        return usable_device(setting, name)
    return device if device.type != "meta" else usable_device(setting, name)


def is_here(device: torch.device) -> bool:
    """Whether this machine has the device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch asserts that it was built for the kind of device
        return False
    return True


def check_device_map(device_map: Any, here: bool = True) -> None:
    """Refuse a device map that names what this machine does not have.

    Args:
        device_map: as `from_pretrained` takes it: None, a way to spread modules, a device, or devices by module.
        here: False for a run on another machine, of which only what is no device is refused.

    Raises:
        ConfigError: see `usable_device`.
        MissingDependencyError: there is one, and Transformers needs accelerate for it.
    """
    if device_map is None:
        return
    if importlib.util.find_spec("accelerate") is None:
        raise MissingDependencyError(f"device_map={device_map!r} needs accelerate: pip install accelerate.")
    if isinstance(device_map, dict):
        places = [each for each in device_map.values() if each not in _NO_DEVICES]
    else:
        places = [] if device_map in SPREADS else [device_map]
    for place in places:
        (usable_device if here else planned_device)("device_map", place)


def computes_elsewhere(device_map: Any) -> bool:
    """Whether weights go to another device than the CPU.

    Args:
        device_map: as `from_pretrained` takes it, checked.
    """
    return bool(accelerators(device_map))


def accelerators(device_map: Any) -> tuple[torch.device, ...]:
    """The accelerators that weights go to, each once; the current one where Transformers spreads them.

    Args:
        device_map: as `from_pretrained` takes it, checked.
    """
    current = torch.accelerator.current_accelerator()
    kind = "cuda" if current is None else current.type  # of a bare number, which is no CPU's
    if isinstance(device_map, str) and device_map in SPREADS:
        return (torch.device(kind),) if torch.accelerator.is_available() else ()
    places = device_map.values() if isinstance(device_map, dict) else [] if device_map is None else [device_map]
    found = [
        torch.device(kind, place) if isinstance(place, int) else torch.device(place)
        for place in places
        if place not in _NO_DEVICES
    ]
    return tuple(dict.fromkeys(device for device in found if device.type != "cpu"))


def main_device(device_map: Any) -> torch.device:
    """The accelerator that weights go to, the first of several; the CPU where there is none.

    Args:
        device_map: as `from_pretrained` takes it, checked.
    """
    return next(iter(accelerators(device_map)), torch.device("cpu"))
