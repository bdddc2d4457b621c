"""Median times of calls: replayed CUDA graphs between events on CUDA, a clock around single calls on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from optimum_sab.errors import SABError

Call = Callable[[], object]

GRAPH_CALLS = 16  # at least; one call alone would be timed with the start of its graph
WARM_REPLAYS = 3
CACHE_MULTIPLE = {"cuda": 5, "cpu": 4}
MINIMAL_ROTATION = {"cuda": 300_000_000, "cpu": 0}
CPU_ROTATION_CAP = 1 << 30
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}  # of the buffer that measures bandwidth, cache sizes aside
COPY_REPEATS = 20


class CaptureError(SABError, RuntimeError):
    """Work that was to be timed inside a CUDA graph cannot be captured."""


def median_seconds(sides: Mapping[str, Sequence[Call]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of one call per side, measured in turns so that all sides meet the same state of the machine.

    Every call of a side does the same work on another copy of the data, so that no copy is still cached when its turn
    comes again (`rotation_bytes`). On CUDA all calls of a side are one graph and a sample is one replay of it; on the
    CPU a sample is one call. Every call must have run before: the first one may compile or convert.

    Raises:
        CaptureError: a side cannot be captured in a CUDA graph.
    """
    if device.type != "cuda":
        return _clock_seconds(sides, repeats)
    with torch.cuda.device(device):
        return _graph_seconds(sides, repeats)


def capture(calls: Sequence[Call], what: str) -> torch.cuda.CUDAGraph:
    """One CUDA graph of these calls, which run once before, on a stream of their own as capture wants it.

    Raises:
        CaptureError: names ``what``.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError as error:
        raise CaptureError(
            f"{what} cannot be captured in a CUDA graph: {error}. Choose another --backend; this one waits for the "
            "device or allocates outside torch."
        ) from error
    return graph


def _graph_seconds(sides: Mapping[str, Sequence[Call]], repeats: int) -> dict[str, float]:
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    counts: dict[str, int] = {}
    for name, calls in sides.items():
        rounds = -(-GRAPH_CALLS // len(calls))
        graphs[name] = capture(list(calls) * rounds, name)
        counts[name] = len(calls) * rounds
        for _ in range(WARM_REPLAYS):
            graphs[name].replay()
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, graph in graphs.items():
            samples[name].append(_event_seconds(graph.replay) / counts[name])
    return {name: statistics.median(values) for name, values in samples.items()}


def _clock_seconds(sides: Mapping[str, Sequence[Call]], repeats: int) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(-1, repeats):
        for name, calls in sides.items():
            seconds = call_seconds(calls[i % len(calls)])
            if i >= 0:  # the round before warms up
                samples[name].append(seconds)
    return {name: statistics.median(values) for name, values in samples.items()}


def rotation_bytes(device: torch.device) -> int:
    """Bytes of distinct weights that must take turns for none of them to stay in the last-level cache."""
    wanted = max(MINIMAL_ROTATION[device.type], CACHE_MULTIPLE[device.type] * last_level_cache(device))
    return wanted if device.type == "cuda" else min(wanted, CPU_ROTATION_CAP)


def last_level_cache(device: torch.device) -> int:
    """Bytes of the GPU's L2, or of the processor's largest cache (32 MiB where the system does not say)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes, default=32 << 20)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written per second by a large copy on the device: the memory roofline."""
    count = max(COPY_BYTES[device.type], 4 * last_level_cache(device)) // 8
    source = torch.empty(count, dtype=torch.int64, device=device).random_()  # zeros can be faster than data
    target = torch.empty_like(source)

    def copy() -> object:
        return target.copy_(source)

    copy()
    if device.type == "cuda":
        with torch.cuda.device(device):
            samples = [_event_seconds(copy) for _ in range(COPY_REPEATS)]
    else:
        samples = [call_seconds(copy) for _ in range(COPY_REPEATS)]
    return 2.0 * 8 * count / statistics.median(samples)


def _event_seconds(call: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call()  # keeps the device busy while the host launches what is timed, so that no gap is timed with it
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def call_seconds(call: Call) -> float:
    """Of one call, by the host's clock."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
