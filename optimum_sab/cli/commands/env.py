"""`optimum-sab env`: versions, devices, and which backend computes on each of them and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

import torch

from optimum_sab.errors import ConfigError
from optimum_sab.json_values import json_line
from optimum_sab.ops.backends import BACKENDS, ENVIRONMENT, choose_backend, why_not
from optimum_sab.version import __version__
from optimum_sab.wording import counted

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "triton",
    "accelerate",
    "safetensors",
    "optimum",
    "peft",
    "greenlet",
    "jinja2",
    "matplotlib",
    "pillow",
    "datasets",
    "pyarrow",
    "kernels",
    "gemlite",
    "humming-kernels",
)


def run(options: argparse.Namespace) -> None:
    """Print the environment; on a GPU this runs the kernels once and compares them with the reference."""
    found = describe()
    if options.json:
        print(json_line(found))
        return
    print(f"optimum-sab {found['optimum_sab']}, Python {found['python']}, {found['platform']}")
    print(", ".join(f"{name} {version or 'not installed'}" for name, version in found["packages"].items()))
    forced = found["forced"]
    print(f"{ENVIRONMENT}: {forced or 'not set'}")
    for device in found["devices"]:
        print(f"\n{device['device']}: {device['name']}\n  backend  {device['backend']} ({device['reason']})")
        for name, problem in device["unusable"].items():
            print(f"  not {name:<9} {problem}")


def describe() -> dict[str, Any]:
    """The environment as one JSON-ready object."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {
        "optimum_sab": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "forced": os.environ.get(ENVIRONMENT) or None,
        "devices": [_describe_device(device) for device in devices],
    }


def _describe_device(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else counted(torch.get_num_threads(), "thread")
    problems = {backend: why_not(backend, device) for backend in BACKENDS}
    found = {"device": str(device), "name": name, "unusable": {b: p for b, p in problems.items() if p is not None}}
    try:
        choice = choose_backend(device)
    except ConfigError as error:  # what the variable asks for cannot be had: that is what the user came to see
        return {**found, "backend": None, "reason": str(error)}
    return {**found, "backend": choice.name, "reason": choice.reason}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
