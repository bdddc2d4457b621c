"""Where a benchmark ran: device, versions, measured memory bandwidth."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from optimum_sab.bench.timing import copy_bandwidth
from optimum_sab.errors import ConfigError
from optimum_sab.wording import did_you_mean

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Environment:
    """What a number depends on besides the code.

    Attributes:
        device: name of the GPU or of the processor.
        torch: version.
        triton: version, None where it is not installed.
        python: version.
        threads: of torch on the CPU.
        bandwidth_bytes_per_second: of a large copy on the device, bytes read plus bytes written, measured in this run.
    """

    device: str
    torch: str
    triton: str | None
    python: str
    threads: int
    bandwidth_bytes_per_second: float


def describe_environment(device: torch.device) -> Environment:
    """The `Environment` of this process, with the bandwidth measured now."""
    return Environment(
        device=device_name(device),
        torch=torch.__version__,
        triton=_triton_version(),
        python=platform.python_version(),
        threads=torch.get_num_threads(),
        bandwidth_bytes_per_second=copy_bandwidth(device),
    )


def find_device(name: str | None) -> torch.device:
    """The device of this name; without one, CUDA where there is a CUDA device and the CPU elsewhere.

    Raises:
        ConfigError: the name is no CPU or CUDA device that this machine has.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is no device; use cpu, cuda or cuda:0.") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ConfigError(f"--device {name!r} cannot be timed here; use cpu, cuda or cuda:0.")
    index = device.index or 0
    if index >= torch.cuda.device_count():  # 0 without CUDA
        raise ConfigError(f"--device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices; use cpu.")
    return torch.device("cuda", index)


def find_dtype(name: str) -> torch.dtype:
    """The dtype of this name; raises `ConfigError` for others than `DTYPES`."""
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name!r} must be one of {', '.join(DTYPES)}{did_you_mean(name, DTYPES)}")
    return DTYPES[name]


def device_name(device: torch.device) -> str:
    """Name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


@contextmanager
def chosen_backend(name: str, device: torch.device) -> Iterator[str]:
    """Inside, packed linears compute with this backend ("auto" chooses); gives the name of what was chosen.

    A CUDA device is the current one inside, as kernels launched by hand expect.
    """
    from optimum_sab.ops.backends import backend_name, force_backend

    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with force_backend(None if name == "auto" else name), current:
        yield backend_name(device)


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    version: str = triton.__version__
    return version
