"""What Python costs at a packed linear on the CPU: the time of its call without that inside of the C kernel.

Beside it, what an operator costs that is given the same tensors and computes nothing: less is out of reach of any.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.nn.linear import SABLinear
from optimum_sab.ops.cpu.compiler import Library, usable_library
from optimum_sab.ops.operands import WEIGHT

ROUNDS = 30  # over all layers
WARM_ROUNDS = 4  # a group of layers is used once it has been seen to work
_PRODUCTS = ("sab_linear", "sab_linears")  # the library's functions that compute layers


_library = torch.library.Library("optimum_sab_bench", "DEF")
_library.define(f"nothing(Tensor x, Tensor? bias, {WEIGHT}, int size) -> Tensor")


def _nothing(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], arguments[-1])


_library.impl("nothing", _nothing, "CompositeExplicitAutograd")
torch.library.register_fake("optimum_sab_bench::nothing", _nothing, lib=_library)


@dataclass(frozen=True)
class PythonTime:
    """Seconds of Python per packed linear.

    Attributes:
        layer: of the layer's call.
        nothing: of an operator in its place that is given the same tensors and returns memory that nobody has filled.
    """

    layer: float
    nothing: float


@dataclass
class KernelTime:
    """Seconds spent inside the kernel since it was last set to 0."""

    seconds: float = 0.0

    def timed(self, function: Callable[..., int]) -> Callable[..., int]:
        """The same function with its time added."""

        def call(*arguments: Any) -> int:
            started = time.perf_counter()
            status = function(*arguments)
            self.seconds += time.perf_counter() - started
            return status

        return call


@contextmanager
def kernel_time(library: Library) -> Iterator[KernelTime]:
    """Inside, calls of the kernel are timed, which itself costs each less than a microsecond."""
    found = KernelTime()
    real = {name: getattr(library, name) for name in _PRODUCTS}
    try:
        for name, function in real.items():
            setattr(library, name, found.timed(function))
        yield found
    finally:
        for name, function in real.items():
            setattr(library, name, function)


@torch.no_grad()
def python_seconds(
    model: nn.Module, rows: int, dtype: torch.dtype, compilers: tuple[str | None, ...]
) -> list[PythonTime]:
    """Medians over rounds in which all packed linears are called, one after the other, siblings with one input.

    Args:
        model: on the CPU; has packed linears that the kernel computes.
        rows: of every input.
        dtype: of every input.
        compilers: in turns, `torch.compile` backends of one graph of all calls; None calls them eagerly.

    Returns:
        One number for each of ``compilers``.
    """
    library = usable_library()
    layers = [module for module in model.modules() if isinstance(module, SABLinear)]
    assert library is not None and layers
    shared: dict[int, Tensor] = {}
    inputs = [
        shared.setdefault(id(layer.group or layer), torch.randn(rows, layer.in_features).to(dtype)) for layer in layers
    ]

    def call(given: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(layers, given)]

    operator = torch.ops.optimum_sab_bench.nothing

    def call_nothing(given: list[Tensor]) -> list[Tensor]:
        return [
            operator(x, layer.bias, layer.tensors, layer.layout, layer.backend, layer.kind, layer.out_features)
            for layer, x in zip(layers, given)
        ]

    calls = [
        work if c is None else torch.compile(work, fullgraph=True, dynamic=False, backend=c)
        for c in compilers
        for work in (call, call_nothing)
    ]
    samples: list[list[float]] = [[] for _ in calls]
    with kernel_time(library) as inside:
        for turn in range(-WARM_ROUNDS, ROUNDS):
            for work, found in zip(calls, samples):
                inside.seconds = 0.0
                started = time.perf_counter()
                work(inputs)
                if turn >= 0:
                    found.append((time.perf_counter() - started - inside.seconds) / len(layers))
    medians = [statistics.median(found) for found in samples]
    return [PythonTime(*pair) for pair in zip(medians[::2], medians[1::2])]
