"""Launch settings per device: from a table in configs/, from a file the user measured, or measured on request."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch

from .geometry import Geometry, ceil_div

CONFIGS = Path(__file__).parent / "configs"
AUTOTUNE = "SAB_KERNELS_AUTOTUNE"  # "1": measure every new shape on its first call
CACHE = "SAB_KERNELS_CACHE"  # folder of what was measured; default ~/.cache/sab_kernels


@dataclass(frozen=True)
class Launch:
    """How products are launched.

    Args:
        decode_tokens: up to so many tokens go through the 8-bit kernel, at most 8.
        decode_tiles: row tiles of one of its programs, 1 or 2.
        decode_programs: programs wanted per multiprocessor; the columns are split to get there.
        decode_unroll: unrolling of its loop over tiles.
        batch_warps: warps, and so row tiles, of a small-batch program: 1, 2, 4 or 8.
        batch_tokens: tokens of one of its programs, a power of two from 16.
        batch_programs: programs wanted per multiprocessor.
        batch_stages: loads in flight.
        dense_tokens: from so many tokens on, the weight is made dense first.
        dense_bytes: largest piece of a dense weight that is held at a time; small enough, it never leaves the cache.
        expert_single: up to so many pairs of a row and an expert for each expert, every pair is computed by itself.
        expert_decode: up to so many, pairs of an expert go through the 8-bit kernel together.
        expert_tokens: most of them that a small-batch program takes together: 16, 32 or 64 (for 128 there are not
            registers enough).
    """

    decode_tokens: int = 8
    decode_tiles: int = 2
    decode_programs: int = 16
    decode_unroll: int = 2
    batch_warps: int = 4
    batch_tokens: int = 32
    batch_programs: int = 2
    batch_stages: int = 3
    dense_tokens: int = 257
    dense_bytes: int = 1 << 25
    expert_single: int = 1
    expert_decode: int = 4
    expert_tokens: int = 64

    def __post_init__(self) -> None:
        allowed = {
            "decode_tokens": range(9),
            "decode_tiles": (1, 2),
            "decode_programs": range(1, 65),
            "decode_unroll": range(1, 9),
            "batch_warps": (1, 2, 4, 8),
            "batch_tokens": (16, 32, 64, 128, 256),
            "batch_programs": range(1, 65),
            "batch_stages": range(1, 9),
            "dense_tokens": range(1, 1 << 31),
            "dense_bytes": range(1 << 20, 1 << 40),
            "expert_single": range(65),
            "expert_decode": range(65),
            "expert_tokens": (16, 32, 64),
        }
        for name, values in allowed.items():
            if not isinstance(getattr(self, name), int) or getattr(self, name) not in values:
                raise ValueError(f"launch setting {name}={getattr(self, name)!r} is not one of {values}.")


@cache
def default_launch(device: torch.device) -> Launch:
    """The table's settings for a CUDA device.

    A device is looked up by the longest key of configs/devices.json that its name contains, then by its compute
    capability, then the class defaults stand.
    """
    table = json.loads((CONFIGS / "devices.json").read_text(encoding="utf-8"))
    name = torch.cuda.get_device_name(device)
    major, minor = torch.cuda.get_device_capability(device)
    keys = [key for key in table["names"] if key.lower() in name.lower()]
    entry = table["names"][max(keys, key=len)] if keys else table["capabilities"].get(f"{major}.{minor}", {})
    return Launch(**{k: v for k, v in entry.items() if k in _NAMES})


_NAMES = frozenset(f.name for f in fields(Launch))


class LaunchCache:
    """Measured settings by shape, in memory and in one JSON file per device and Triton version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Launch] = {}
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            self.entries = {key: Launch(**value) for key, value in stored.items()}

    def measured(self, key: str, candidates: Iterable[Launch], time: Callable[[Launch], float]) -> Launch:
        """The fastest candidate for ``key``: remembered, or timed now and written to the file."""
        if key not in self.entries:
            self.entries[key] = min(candidates, key=time)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(f".{os.getpid()}.tmp")
            text = json.dumps({k: asdict(v) for k, v in self.entries.items()}, indent=1)
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.path)  # several processes may tune at once; none may read half a file
        return self.entries[key]


@cache
def launch_cache(device: torch.device) -> LaunchCache:
    """The cache of a CUDA device."""
    import triton

    root = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "sab_kernels")
    name = torch.cuda.get_device_name(device).replace(" ", "_").replace("/", "_")
    return LaunchCache(root / f"{name}-triton-{triton.__version__}.json")


def tunes(device: torch.device) -> bool:
    """Whether a shape that is new on this device is to be measured now."""
    asked = device.type == "cuda" and os.environ.get(AUTOTUNE) == "1"
    return asked and not torch.cuda.is_current_stream_capturing()


def fastest(device: torch.device, key: str, options: Iterable[Launch], run: Callable[[Launch], None]) -> Launch:
    """The settings with which a CUDA device takes the least time: remembered, or measured now."""
    from triton.testing import do_bench

    def time(option: Launch) -> float:
        return do_bench(lambda: run(option), warmup=5, rep=20, return_mode="median")

    return launch_cache(device).measured(key, options, time)


def device_launch(device: torch.device) -> Launch:
    """The table's settings for a device, if it is a CUDA device."""
    return default_launch(device) if device.type == "cuda" else Launch()


def settings_key(tokens: int, geometry: Geometry, dtype: torch.dtype) -> str:
    """What is measured once: a shape, and a number of tokens that others up to the next power of two share."""
    bucket = tokens if tokens <= 8 else 1 << (tokens - 1).bit_length()
    planes = f"{geometry.base_planes}+{geometry.residual_planes}"
    planes += "".join(f" {taps:b}" for taps in geometry.code)
    return f"{bucket}x{geometry.rows}x{geometry.columns} {planes} {geometry.block_size} {dtype}"


def candidates(tokens: int, launch: Launch) -> list[Launch]:
    """What is tried for a shape with so many tokens."""
    if tokens <= launch.decode_tokens:
        grid = [(t, p, u) for t in (1, 2) for p in (8, 16, 24, 32) for u in (1, 2, 4)]
        return [replace(launch, decode_tiles=t, decode_programs=p, decode_unroll=u) for t, p, u in grid]
    batch = [
        replace(launch, batch_warps=w, batch_tokens=t, batch_programs=p, batch_stages=s, dense_tokens=tokens + 1)
        for w in (2, 4, 8)
        for t in (16, 32, 64, 128)
        for p in (1, 2, 4)
        for s in (2, 3, 4)
        if t <= max(16, 2 * tokens)
    ]
    dense = [
        replace(launch, dense_tokens=min(tokens, launch.dense_tokens), dense_bytes=1 << b) for b in (24, 25, 26, 27, 29)
    ]
    return [*batch, *dense] if tokens > 64 else batch


def expert_candidates(pairs: int, experts: int, dtype: torch.dtype, launch: Launch) -> list[Launch]:
    """What is tried for so many pairs of a row and one of so many experts."""
    each, found = ceil_div(pairs, experts), []
    if dtype != torch.float32 and each <= 8:
        ways = [(0, 8), (8, 8)] if each <= 4 else [(0, 8)]  # in tiles, or pairs by themselves
        grid = [(s, d, t, p, u) for s, d in ways for t in (1, 2) for p in (8, 16, 32) for u in (1, 2)]
        found = [
            replace(launch, expert_single=s, expert_decode=d, decode_tiles=t, decode_programs=p, decode_unroll=u)
            for s, d, t, p, u in grid
        ]
    batch = replace(launch, expert_single=0, expert_decode=0)
    sizes = [16] if dtype == torch.float32 else [t for t in (16, 32, 64) if t <= max(16, 4 * each)]
    grid = [(w, t, p, s) for w in (2, 4, 8) for t in sizes for p in (1, 2, 4) for s in (2, 3, 4)]
    return found + [
        replace(batch, batch_warps=w, expert_tokens=t, batch_programs=p, batch_stages=s) for w, t, p, s in grid
    ]
