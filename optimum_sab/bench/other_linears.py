"""Linears of other packages that are timed beside ours, by the option of `bench kernels` that asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_sab.bench import gemlite_linears, humming_linears, int4_linears
from optimum_sab.bench.conditions import Conditions
from optimum_sab.bench.shapes import LinearShape


@dataclass(frozen=True)
class OtherLinear:
    """One kind of linear.

    Attributes:
        name: of its fields in `kernels.KernelTiming`, without ``_seconds`` and ``_error``.
        title: of its column in the table.
        supports: whether it takes a shape.
        make: of a shape, conditions and a seed: a callable x [tokens, in] → [tokens, out].
        weight: the dense fp32 weight [out, in] of what ``make`` gives for the same arguments.
        bytes: of what is stored for a shape.
    """

    name: str
    title: str
    supports: Callable[[LinearShape], bool]
    make: Callable[[LinearShape, Conditions, int], Callable[[Tensor], Tensor]]
    weight: Callable[[LinearShape, Conditions, int], Tensor]
    bytes: Callable[[LinearShape], int]


def _gemlite(bits: int) -> OtherLinear:
    own = gemlite_linears
    return _of_bits("gemlite", bits, own.supports, own.gemlite_linear, own.gemlite_weight, own.gemlite_bytes)


def _humming(bits: int) -> OtherLinear:
    own = humming_linears
    return _of_bits("humming", bits, own.supports, own.humming_linear, own.humming_weight, own.humming_bytes)


def _of_bits(
    package: str,
    bits: int,
    supports: Callable[[LinearShape], bool],
    linear: Callable[[int, LinearShape, torch.dtype, torch.device, int], Callable[[Tensor], Tensor]],
    weight: Callable[[int, LinearShape, torch.dtype, torch.device, int], Tensor],
    size: Callable[[int, LinearShape], int],
) -> OtherLinear:
    """What a package computes with so many bits."""
    return OtherLinear(
        name=f"{package}_{bits}bit",
        title=f"{package} {bits}b",
        supports=supports,
        make=lambda shape, at, seed: linear(bits, shape, at.dtype, at.device, seed),
        weight=lambda shape, at, seed: weight(bits, shape, at.dtype, at.device, seed),
        bytes=lambda shape: size(bits, shape),
    )


_INT4 = OtherLinear(
    name="int4",
    title="int4",
    supports=int4_linears.supports,
    make=lambda shape, at, seed: int4_linears.int4_linear(shape, seed),
    weight=lambda shape, at, seed: int4_linears.int4_weight(shape, seed),
    bytes=int4_linears.int4_bytes,
)

OTHERS: dict[str, tuple[OtherLinear, ...]] = {
    "gemlite": tuple(_gemlite(bits) for bits in gemlite_linears.BITS),
    "humming": tuple(_humming(bits) for bits in humming_linears.BITS),
    "int4": (_INT4,),
}
CHECKS: dict[str, Callable[[torch.device, torch.dtype], None]] = {
    "gemlite": gemlite_linears.check_gemlite,
    "humming": humming_linears.check_humming,
    "int4": int4_linears.check_int4,
}


def chosen_linears(names: Sequence[str]) -> list[OtherLinear]:
    """All kinds of these packages, in the order of `OTHERS`."""
    return [linear for package, linears in OTHERS.items() if package in names for linear in linears]


def check_others(names: Sequence[str], conditions: Conditions) -> None:
    """Whether these packages can be measured here.

    Raises:
        MissingDependencyError: one is not installed, or there is no CUDA device for it.
        ConfigError: one does not compute on this device or in this dtype.
    """
    for name in names:
        CHECKS[name](conditions.device, conditions.dtype)
