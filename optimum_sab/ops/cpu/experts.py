"""Products of routed rows with a stack of packed layers on the CPU, in one launch over the layers that have rows."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from optimum_sab.errors import FormatError
from optimum_sab.ops.backends import cpu_may_compute
from optimum_sab.ops.cpu.compiler import Library, load_library, usable_library
from optimum_sab.ops.cpu.kernel import DTYPES, check_status, dense_from, multiply_dense
from optimum_sab.ops.cpu.layer import Stack, known_layer, known_stack
from optimum_sab.ops.shape import LayerShape


def experts_linear_of(
    x: Tensor, experts: Tensor, tensors: Sequence[Tensor], shape: LayerShape, bias: Tensor | None, repeats: int
) -> Tensor:
    """``y[s] = x[s // repeats] Ŵ[e]ᵀ + b[e]`` with ``e = experts[s]``, without gradients; 0 where e is no expert.

    A row is what `kernel.linear_of` gives for it with its expert's tensors, bit for bit where both take the same way.
    Experts with as many rows as make the dense way faster take that (`kernel.dense_from`), one after the other.

    Args:
        x: [pairs // repeats, in], float32, bfloat16 or float16 in CPU memory.
        experts: [pairs], an integer dtype.
        tensors: [experts, ...] as stored, in the order of ``shape.names``, contiguous in CPU memory.
        shape: of one expert.
        bias: [experts, out] of any floating dtype, or None.
        repeats: pairs that read the same row.

    Returns:
        y [pairs, out] in x's dtype.

    Raises:
        FormatError: a stored tensor is not as `tensor_specs` says, or not contiguous in CPU memory.
        MissingDependencyError: the kernel cannot be compiled here (compiler.py).
        MemoryError: no room for the scratch memory.
    """
    library, stack = load_library(), known_stack(tensors, shape)
    added = None if bias is None else bias.detach().to(x.dtype).contiguous()
    chosen, rows = experts.to(torch.int64).contiguous(), x.contiguous()
    crowded = _crowded(chosen, stack.experts, dense_from(library, x.dtype))
    if not crowded:
        return _launch(library, stack, rows, chosen, added, repeats)
    others = chosen.masked_fill(torch.isin(chosen, torch.tensor(crowded)), -1)
    y = _launch(library, stack, rows, others, added, repeats)
    for expert in crowded:
        pairs = (chosen == expert).nonzero()[:, 0]
        own = multiply_dense(library, known_layer([t[expert] for t in tensors], shape), rows[pairs // repeats])
        y[pairs] = own if added is None else own.add_(added[expert])
    return y


def direct_experts(
    x: Tensor, experts: Tensor, tensors: Sequence[Tensor], shape: LayerShape, bias: Tensor | None, repeats: int
) -> Tensor | None:
    """`experts_linear_of` past the dispatcher, or None where the operator has to be asked.

    Args:
        x: for which `direct.only_values` holds. The rest as there.
        experts: and so on: whatever they are.

    Raises:
        MemoryError: no room for the scratch memory.
    """
    library, dtype, pairs = usable_library(), x.dtype, experts.numel()
    if (
        library is None
        or type(experts) is not Tensor
        or experts.dtype is not torch.int64
        or not experts.is_cpu
        or not experts.is_contiguous()
        or experts.dim() != 1
        or repeats < 1
        or x.dim() != 2
        or x.shape[0] * repeats != pairs
        or x.shape[1] != shape.in_features
        or not cpu_may_compute()
        or pairs >= dense_from(library, dtype)
    ):
        return None
    try:
        stack = known_stack(tensors, shape)
    except FormatError:
        return None  # the operator says what is wrong
    if bias is not None and (
        bias.dtype is not dtype
        or not bias.is_cpu
        or not bias.is_contiguous()
        or bias.shape != (stack.experts, shape.out_features)
        or (bias.requires_grad and torch.is_grad_enabled())
    ):
        return None
    return _launch(library, stack, x if x.is_contiguous() else x.contiguous(), experts, bias, repeats)


def _crowded(experts: Tensor, count: int, rows: int) -> list[int]:
    """Experts with at least so many rows."""
    if experts.numel() < rows:
        return []
    inside = experts[(experts >= 0) & (experts < count)]
    return [int(e) for e in (inside.bincount(minlength=count) >= max(1, rows)).nonzero()[:, 0]]


def _launch(library: Library, stack: Stack, x: Tensor, experts: Tensor, bias: Tensor | None, repeats: int) -> Tensor:
    """The kernel; x, experts (int64) and bias (of x's dtype) are contiguous."""
    layer = stack.first
    y = x.new_empty((experts.shape[0], layer.rows))
    status = library.sab_experts(
        ctypes.addressof(stack),
        y.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        experts.data_ptr(),
        experts.shape[0],
        repeats,
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    if status:
        check_status(status, layer.rows, layer.columns)
    return y
