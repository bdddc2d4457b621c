"""A layer as C reads it: the structure, and the checks of the tensors that C trusts."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import TypeVar

from torch import Tensor

from optimum_sab.core.code import NO_CODE, TRELLIS16, TRELLIS16X2
from optimum_sab.errors import FormatError
from optimum_sab.format.layout import TensorSpec, salient_per_block, tensor_specs
from optimum_sab.ops.shape import LayerShape

CODES = {NO_CODE: 0, TRELLIS16.name: 1, TRELLIS16X2.name: 2}  # that C computes, all of core/code.py


class Layer(ctypes.Structure):
    """`layer_t` of binary_linear.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "residual_sign", "residual_index")),
        *((name, ctypes.c_void_p) for name in ("row_scale", "row_exponent", "col_scale")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "block_size", "base_planes", "residual_planes")),
        *((name, ctypes.c_int64) for name in ("salient", "salient_last", "wide_index", "coded")),
    ]


_POINTERS = tuple(field[0] for field in Layer._fields_[:6])


class Stack(ctypes.Structure):
    """`experts_t` of experts.h: the first of its layers, how many there are, and bytes from each to the next."""

    _fields_ = [
        ("first", Layer),
        ("experts", ctypes.c_int64),
        ("stride", ctypes.c_int64 * len(_POINTERS)),
    ]


@dataclass(frozen=True)
class _Layout:
    """What follows from a layer's shape, computed once per kind of layer.

    Attributes:
        specs: of the stored tensors.
        layer: bytes of a `Layer` without pointers.
    """

    specs: tuple[tuple[str, TensorSpec], ...]
    layer: bytes


@lru_cache(maxsize=1024)
def _layout(shape: LayerShape) -> _Layout:
    salient = salient_per_block(shape.in_features, shape.settings)
    layer = Layer(
        rows=shape.out_features,
        columns=shape.in_features,
        block_size=shape.block_size,
        base_planes=shape.base_planes,
        residual_planes=shape.residual_planes,
        salient=salient[0],
        salient_last=salient[-1],
        wide_index=shape.block_size > 256,
        coded=CODES[shape.code],
    )
    return _Layout(tuple(tensor_specs(shape.out_features, shape.in_features, shape.settings).items()), bytes(layer))


def describe(tensors: Sequence[Tensor | None], shape: LayerShape) -> Layer:
    """The layer of these tensors, which must stay alive as long as C reads it.

    Args:
        tensors: stored, in the order of ``shape.names``; None for one that is missing.
        shape: of the layer.

    Raises:
        FormatError: a tensor is missing or not as `tensor_specs` says, or not contiguous in CPU memory.
    """
    return _described(tensors, shape, ())


def describe_stack(tensors: Sequence[Tensor], shape: LayerShape) -> Stack:
    """The same of tensors [experts, ...], each of which holds those of all experts."""
    experts = tensors[0].shape[0] if tensors[0].dim() else 0
    first = _described(tensors, shape, (experts,))
    stack = Stack(first=first, experts=experts)
    for (name, _), tensor in zip(_layout(shape).specs, tensors, strict=True):
        stack.stride[_POINTERS.index(name)] = tensor.nbytes // max(1, experts)
    return stack


def _described(tensors: Sequence[Tensor | None], shape: LayerShape, leading: tuple[int, ...]) -> Layer:
    layout = _layout(shape)
    if len(tensors) != len(layout.specs):
        raise FormatError(f"{len(tensors)} tensors are no layer; it has {', '.join(n for n, _ in layout.specs)}.")
    layer = Layer.from_buffer_copy(layout.layer)
    for (name, spec), tensor in zip(layout.specs, tensors, strict=True):
        if tensor is None:
            raise FormatError(f"tensor {name!r} is missing; the layer needs {', '.join(n for n, _ in layout.specs)}.")
        expected = (*leading, *spec.shape)
        if tensor.dtype is not spec.dtype or tensor.shape != expected:
            raise FormatError(
                f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected {spec.dtype} {expected}."
            )
        if not tensor.is_cpu or not tensor.is_contiguous():
            raise FormatError(
                f"tensor {name!r} is on {tensor.device} with strides {tensor.stride()}; move it to the CPU and make "
                "it contiguous."
            )
        setattr(layer, name, tensor.data_ptr())
    return layer


_ADDRESS, _IN_ORDER = Tensor.data_ptr, Tensor.is_contiguous
_DTYPE, _SHAPE = attrgetter("dtype"), attrgetter("shape")  # through `map` they cost a third of what expressions do
_MOST_KNOWN = 4096
_Seen = list[object]  # what is compared of tensors that were described before
_known: dict[int, tuple[_Seen, Layer]] = {}  # by the address of the first tensor: less to hash than all of them
_known_stacks: dict[int, tuple[_Seen, Stack]] = {}


def known_layer(tensors: Sequence[Tensor], shape: LayerShape) -> Layer:
    """`describe`, done once for the same memory seen in the same way.

    Address, dtype, shape and order in memory of every tensor are compared at every call, because loaders, offloading
    and ``tensor.data = …`` put others in place past a module's methods. No other device's memory has an address of the
    CPU's. No tensor is kept alive.

    Raises:
        FormatError: see `describe`.
    """
    return _remembered(_known, describe, tensors, shape)


def known_stack(tensors: Sequence[Tensor], shape: LayerShape) -> Stack:
    """`describe_stack` in the same way.

    Raises:
        FormatError: see `describe`.
    """
    return _remembered(_known_stacks, describe_stack, tensors, shape)


_Described = TypeVar("_Described", Layer, Stack)


def _remembered(
    known: dict[int, tuple[_Seen, _Described]],
    describing: Callable[[Sequence[Tensor], LayerShape], _Described],
    tensors: Sequence[Tensor],
    shape: LayerShape,
) -> _Described:
    seen = [shape, *map(_ADDRESS, tensors), *map(_DTYPE, tensors), *map(_SHAPE, tensors), *map(_IN_ORDER, tensors)]
    first = seen[1]
    found = known.get(first)
    if found is None or found[0] != seen:
        found = seen, describing(tensors, shape)
        if len(known) >= _MOST_KNOWN:
            known.clear()
        known[first] = found
    return found[1]
