"""Linears on the CPU straight from a module's tensors: dispatch takes longer than a token does in a small layer.

Only where nobody would notice: nothing traces, records, transforms or replaces operators, no gradient is wanted, and
the tensors are plain ones in CPU memory. Everything else goes through the operator, errors too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled, forward_ad

from optimum_sab.errors import FormatError
from optimum_sab.ops.backends import cpu_may_compute
from optimum_sab.ops.cpu.compiler import usable_library
from optimum_sab.ops.cpu.kernel import DTYPES, MAX_MEMBERS, check_status, dense_from
from optimum_sab.ops.cpu.layer import Layer, known_layer
from optimum_sab.ops.shape import LayerShape

_POINTERS = [ctypes.c_void_p * count for count in range(MAX_MEMBERS + 1)]
Parameters = Mapping[str, Tensor | None]


def only_values(x: Any) -> bool:
    """Whether an operator called with x would compute values and do nothing else."""
    return (
        not torch.compiler.is_dynamo_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and x.dtype in DTYPES
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
        and forward_ad._current_level < 0
        and not _profiler_enabled()
        and not x.is_neg()
    )


class DirectLinear:
    """One layer's way to the kernel.

    Args:
        shape: of the layer.

    Attributes:
        rows, columns: of its weight.
    """

    __slots__ = ("_stored", "columns", "rows", "shape")

    def __init__(self, shape: LayerShape) -> None:
        self.shape = shape
        self.rows, self.columns, self._stored = shape.out_features, shape.in_features, itemgetter(*shape.names)

    def __call__(self, x: Tensor, parameters: Parameters, backend: str | None) -> Tensor | None:
        """``y = x Ŵᵀ + b``, or None where the operator has to be asked.

        Args:
            x: [..., in] for which `only_values` holds.
            parameters: the module's, by name; the stored tensors and ``bias``.
            backend: as `SABLinear.backend`.

        Raises:
            MemoryError: no room for the scratch memory.
        """
        return self.of(x, self._stored(parameters), parameters["bias"], backend)

    def of(self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, backend: str | None) -> Tensor | None:
        """The same of tensors that belong to no module: as stored, in the order of ``shape.names``."""
        library, dtype, sizes = usable_library(), x.dtype, [*x.shape]
        if library is None or not sizes or sizes[-1] != self.columns or not cpu_may_compute(backend):
            return None
        known, tokens = self._known(tensors, bias, dtype), x.numel() // self.columns
        if known is None or tokens >= dense_from(library, dtype):
            return None
        layer, added = known
        if not x.is_contiguous():
            x = x.contiguous()
        sizes[-1] = self.rows
        y = x.new_empty(*sizes)  # given as a list, sizes take half a microsecond more
        status = library.sab_linear(
            ctypes.addressof(layer), y.data_ptr(), added, x.data_ptr(), tokens, DTYPES[dtype], torch.get_num_threads()
        )
        if status:
            check_status(status, self.rows, self.columns)
        return y

    def known(self, parameters: Parameters, dtype: torch.dtype) -> tuple[Layer, int | None] | None:
        """The layer and the address of its bias, for inputs of a dtype; None where C cannot read them as they are."""
        return self._known(self._stored(parameters), parameters["bias"], dtype)

    def _known(
        self, tensors: Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> tuple[Layer, int | None] | None:
        address = None
        if bias is not None:
            if (
                bias.dtype is not dtype
                or not bias.is_cpu
                or not bias.is_contiguous()
                or bias.numel() != self.rows
                or (bias.requires_grad and torch.is_grad_enabled())
            ):
                return None
            address = bias.data_ptr()
        try:
            return known_layer(tensors, self.shape), address
        except FormatError:
            return None  # the operator says what is wrong


@lru_cache(maxsize=1024)
def direct_linear(shape: str) -> DirectLinear:
    """The way of layers of a `LayerShape.text`."""
    return DirectLinear(LayerShape.read(shape))


def direct_linears(
    x: Tensor, linears: Sequence[DirectLinear], parameters: Sequence[Parameters], backend: str | None
) -> list[Tensor] | None:
    """`DirectLinear` of up to `kernel.MAX_MEMBERS` layers of one input in one launch.

    Args:
        x: [..., in] for which `only_values` holds.
        linears: of layers with the same number of columns and the same settings.
        parameters: of each.
        backend: of all.

    Raises:
        MemoryError: no room for the scratch memory.
    """
    library, dtype = usable_library(), x.dtype
    sizes, columns = [*x.shape], linears[0].columns
    if library is None or not sizes or sizes[-1] != columns or not cpu_may_compute(backend):
        return None
    tokens = x.numel() // columns
    if tokens >= dense_from(library, dtype):
        return None
    layers, biases, outputs = [], [], []
    for linear, own in zip(linears, parameters):
        known = linear.known(own, dtype)
        if known is None:
            return None
        layers.append(known[0])
        biases.append(known[1])
        sizes[-1] = linear.rows
        outputs.append(x.new_empty(*sizes))
    pointers = _POINTERS[len(layers)]
    if not x.is_contiguous():
        x = x.contiguous()
    status = library.sab_linears(
        len(layers),
        pointers(*map(ctypes.addressof, layers)),
        pointers(*map(Tensor.data_ptr, outputs)),
        pointers(*biases),
        x.data_ptr(),
        tokens,
        DTYPES[dtype],
        torch.get_num_threads(),
    )
    if status:
        check_status(status, sum(linear.rows for linear in linears), columns)
    return outputs
