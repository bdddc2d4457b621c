"""Times of a packed linear against `torch.nn.functional.linear` with a dense weight, side by side in one run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from optimum_sab.bench.busy import busy_seconds, check_busy
from optimum_sab.bench.conditions import Conditions
from optimum_sab.bench.environment import Environment, chosen_backend, describe_environment
from optimum_sab.bench.other_linears import OtherLinear, check_others, chosen_linears
from optimum_sab.bench.random_layers import random_linear
from optimum_sab.bench.shapes import LinearShape
from optimum_sab.bench.timing import Call, median_seconds, rotation_bytes
from optimum_sab.bench.verification import check_error, linear_error
from optimum_sab.core.code import NO_CODE
from optimum_sab.errors import ConfigError
from optimum_sab.format.random_weight import SCALE

TOKENS = {"cpu": (1, 4, 16, 64, 256), "cuda": (1, 4, 16, 64, 256, 1024, 4096)}
SHAPES = {"cpu": ("4096x4096",), "cuda": ("qwen2.5-vl-7b", "qwen2.5-vl-72b")}


@dataclass(frozen=True)
class KernelTiming:
    """One shape at one number of tokens.

    Attributes:
        name: where the shape comes from.
        device: name of the GPU or processor.
        backend: what the packed linear computed with.
        dtype: of inputs, outputs and the dense weight.
        m: tokens.
        out_features: rows of the weight.
        in_features: columns of the weight.
        bits_per_weight: from the stored bytes of the packed layer.
        bytes: what one call must move: the packed layer, input and output.
        seconds: of the packed linear, median.
        dense_seconds: of the dense linear, median.
        speedup: ``dense_seconds / seconds``.
        roofline_fraction: ``bytes / bandwidth / seconds``, with the bandwidth of a copy measured in the same run.
        rotated_bytes: bytes of the packed layers that took turns.
        dense_rotated_bytes: bytes of the dense weights that took turns.
        error: against the dense product with the dequantized weight, `verification.relative_error`.
        gemlite_1bit_seconds: of gemlite's linear, None where it was not run; likewise for 2 and 4 bits.
        int4_seconds: of torch's int4 kernel on the CPU with the base plane alone, None where it was not run.
        int4_error: as ``error``, reported and not judged.
        coded_seconds: of the packed linear with a code, None where none was asked for.
        coded_error: as ``error``, and judged.
        quiet_seconds, busy_seconds, busy_mean_seconds: of packed linears that follow each other: the median, then the
            median and the mean while other processes are busy (`busy.BusySeconds`); None where there were none.
            ``dense_…`` are the dense linear's.
        gemlite_1bit_error: as ``error``, reported and not judged; likewise for 2 and 4 bits.
        humming_1bit_seconds, humming_1bit_error: of Humming's linear, as gemlite's; likewise for 2 bits.
    """

    name: str
    device: str
    backend: str
    dtype: str
    m: int
    out_features: int
    in_features: int
    bits_per_weight: float
    bytes: int
    seconds: float
    dense_seconds: float
    speedup: float
    roofline_fraction: float
    rotated_bytes: int
    dense_rotated_bytes: int
    error: float
    gemlite_1bit_seconds: float | None = None
    gemlite_2bit_seconds: float | None = None
    gemlite_4bit_seconds: float | None = None
    gemlite_1bit_error: float | None = None
    gemlite_2bit_error: float | None = None
    gemlite_4bit_error: float | None = None
    humming_1bit_seconds: float | None = None
    humming_2bit_seconds: float | None = None
    humming_1bit_error: float | None = None
    humming_2bit_error: float | None = None
    int4_seconds: float | None = None
    int4_error: float | None = None
    coded_seconds: float | None = None
    coded_error: float | None = None
    quiet_seconds: float | None = None
    busy_seconds: float | None = None
    busy_mean_seconds: float | None = None
    dense_quiet_seconds: float | None = None
    dense_busy_seconds: float | None = None
    dense_busy_mean_seconds: float | None = None


@dataclass(frozen=True)
class KernelReport:
    """All rows of one run, where it ran, and beside how many busy processes the busy times were taken."""

    environment: Environment
    busy: int
    rows: tuple[KernelTiming, ...]


@dataclass(frozen=True)
class _Run:
    """What all shapes of a run share; the conditions name the backend that was chosen."""

    conditions: Conditions
    environment: Environment
    others: Sequence[OtherLinear]


@dataclass
class _Side:
    """Copies of one linear that take turns, each x → y, and what they compute wrong, per number of tokens."""

    linears: list[Callable[[Tensor], Tensor]]
    bytes: int
    errors: dict[int, float] = field(default_factory=dict)


@torch.no_grad()
def compare_kernels(
    shapes: Sequence[LinearShape],
    tokens: Sequence[int],
    conditions: Conditions,
    others: Sequence[str] = (),
    on_row: Callable[[KernelTiming], None] | None = None,
) -> KernelReport:
    """Time every shape at every number of tokens, dense and packed in turns, after checking the packed result.

    Weights rotate: so many copies take turns that none is still in the last-level cache when it comes again, as in a
    model, unless memory does not suffice (``rotated_bytes`` tells). See `timing.median_seconds` for the clock.

    Args:
        shapes: the linears.
        tokens: rows of the input, M.
        conditions: everything else.
        others: time these packages' linears as well (`other_linears.OTHERS`).
        on_row: is given every row as soon as it is there.

    Raises:
        ConfigError: a number is below 1, or busy processes are asked for on another device than the CPU.
        MissingDependencyError: another package was asked for and cannot run.
        WrongResultError: the packed linear's result is not the dense one's.
        CaptureError: the packed linear cannot be captured in a CUDA graph.
    """
    device = conditions.device
    check_busy(conditions.busy, device)
    for name, value in [("--repeats", conditions.repeats), *(("--tokens", m) for m in tokens)]:
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1.")
    check_others(others, conditions)
    rows: list[KernelTiming] = []
    with chosen_backend(conditions.backend, device) as chosen:
        environment = describe_environment(device)
        run = _Run(replace(conditions, backend=chosen), environment, chosen_linears(others))
        for shape in shapes:
            for row in _time_shape(shape, tokens, run):
                rows.append(row)
                if on_row is not None:
                    on_row(row)
            _free(device)
    return KernelReport(environment, conditions.busy, tuple(rows))


def _time_shape(shape: LinearShape, tokens: Sequence[int], run: _Run) -> Iterator[KernelTiming]:
    conditions, environment = run.conditions, run.environment
    device, dtype = conditions.device, conditions.dtype
    generator = torch.Generator(device).manual_seed(conditions.seed)
    inputs = {m: torch.randn(m, shape.in_features, dtype=dtype, device=device, generator=generator) for m in tokens}
    packed, bits = _packed_side(shape, inputs, conditions)
    sides = {"packed": packed, "dense": _dense_side(shape, conditions, generator)}
    if conditions.code != NO_CODE:
        settings = conditions.settings.replace(code=conditions.code)
        sides["coded"] = _packed_side(shape, inputs, replace(conditions, settings=settings))[0]
    sides |= {o.name: _other_side(o, shape, inputs, conditions) for o in run.others if o.supports(shape)}
    for m in tokens:
        calls = _calls(sides, inputs[m])
        seconds = median_seconds(calls, device, conditions.repeats)
        moved = packed.bytes + m * (shape.in_features + shape.out_features) * dtype.itemsize
        more: dict[str, Any] = {}
        for name, side in sides.items():
            if name not in ("packed", "dense"):
                more |= {f"{name}_seconds": seconds[name], f"{name}_error": side.errors[m]}
        if conditions.busy:
            compared = {"": calls["packed"], "dense_": calls["dense"]}
            for start, busy in busy_seconds(compared, conditions.busy, conditions.repeats).items():
                more |= {f"{start}quiet_seconds": busy.quiet, f"{start}busy_seconds": busy.median}
                more[f"{start}busy_mean_seconds"] = busy.mean
        yield KernelTiming(
            name=shape.name,
            device=environment.device,
            backend=conditions.backend,
            dtype=str(dtype).removeprefix("torch."),
            m=m,
            out_features=shape.out_features,
            in_features=shape.in_features,
            bits_per_weight=bits,
            bytes=moved,
            seconds=seconds["packed"],
            dense_seconds=seconds["dense"],
            speedup=seconds["dense"] / seconds["packed"],
            roofline_fraction=moved / environment.bandwidth_bytes_per_second / seconds["packed"],
            rotated_bytes=packed.bytes * len(packed.linears),
            dense_rotated_bytes=sides["dense"].bytes * len(sides["dense"].linears),
            error=packed.errors[m],
            **more,
        )


def _calls(sides: Mapping[str, _Side], inputs: Tensor) -> dict[str, list[Call]]:
    return {name: [partial(linear, inputs) for linear in side.linears] for name, side in sides.items()}


def _packed_side(shape: LinearShape, inputs: Mapping[int, Tensor], conditions: Conditions) -> tuple[_Side, float]:
    """The packed layers, checked, and their bits per weight as stored."""
    layer = random_linear(
        shape.out_features, shape.in_features, conditions.settings, conditions.seed, conditions.device
    )
    # both before the first call, which may convert the layer
    stored, bits = layer.packed.stored_bytes, layer.bits_per_weight
    weight = layer.dequantize().weight
    side = _Side([layer], stored)
    for m, x in inputs.items():
        error = linear_error(layer, x, weight)
        what = f"backend {conditions.backend!r}, {shape.out_features}x{shape.in_features}, {m} tokens: the result"
        check_error(error, conditions.dtype, what)
        side.errors[m] = error
    del weight
    _free(conditions.device)
    for i in range(1, _copies(stored, conditions)):
        other = random_linear(
            shape.out_features, shape.in_features, conditions.settings, conditions.seed + i, conditions.device
        )
        other(inputs[min(inputs)])  # converts it
        side.linears.append(other)
    return side, bits


def _dense_side(shape: LinearShape, conditions: Conditions, generator: torch.Generator) -> _Side:
    size = (shape.out_features, shape.in_features)
    side = _Side([], size[0] * size[1] * conditions.dtype.itemsize)
    for _ in range(_copies(side.bytes, conditions)):
        weight = torch.randn(size, dtype=conditions.dtype, device=conditions.device, generator=generator).mul_(SCALE)
        side.linears.append(partial(dense_linear, weight=weight))
    return side


def _other_side(other: OtherLinear, shape: LinearShape, inputs: Mapping[int, Tensor], conditions: Conditions) -> _Side:
    side = _Side([], other.bytes(shape))
    side.linears += [other.make(shape, conditions, conditions.seed + i) for i in range(_copies(side.bytes, conditions))]
    weight = other.weight(shape, conditions, conditions.seed)
    for m, x in inputs.items():
        side.errors[m] = linear_error(side.linears[0], x, weight)
    return side


def _copies(size: int, conditions: Conditions) -> int:
    """How many copies take turns: enough to defeat the cache, as long as a fifth of the free memory holds them.

    On the CPU a sample is one call, so that more copies than samples would not be touched.
    """
    wanted = -(-rotation_bytes(conditions.device) // size)
    if conditions.device.type == "cpu":
        return min(wanted, conditions.repeats)
    free, _ = torch.cuda.mem_get_info(conditions.device)
    return min(wanted, max(1, free // (5 * size)))


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
