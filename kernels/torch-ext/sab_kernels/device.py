"""What launches depend on of a device, and launching on it."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class DeviceTraits:
    """What launches depend on of a device; the defaults are the interpreter's.

    Attributes:
        processors: multiprocessors.
        native_fp8: whether it converts e4m3 itself.
        bf16: whether it computes in bfloat16; Triton's interpreter multiplies the bit patterns and cuts instead of
            rounding.
        asm: whether it takes PTX.
        warpgroup: whether four warps have a matrix instruction in common (Hopper).
    """

    processors: int = 2
    native_fp8: bool = False
    bf16: bool = False
    asm: bool = False
    warpgroup: bool = False


@cache
def device_traits(device: torch.device) -> DeviceTraits:
    """The traits of this device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        processors = properties.multi_processor_count
        if interpreted() or torch.version.hip is not None:
            return DeviceTraits(processors, bf16=not interpreted())
        native_fp8 = (properties.major, properties.minor) >= (8, 9)
        return DeviceTraits(processors, native_fp8, bf16=True, asm=True, warpgroup=properties.major == 9)
    if device.type != "cpu":
        properties = torch.get_device_module(device).get_device_properties(device)
        return DeviceTraits(getattr(properties, "max_compute_units", 64), bf16=not interpreted())
    return DeviceTraits()


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, instead of a compiler."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def computing_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which kernels compute what is asked for in ``dtype``: fp32 for bf16 where there is none."""
    wide = dtype == torch.bfloat16 and not device_traits(device).bf16
    return torch.float32 if wide else dtype


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Kernels launch on the current device: makes it this one."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
