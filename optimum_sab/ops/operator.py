"""`optimum_sab::binary_linear`: products with packed weights as PyTorch operators.

With a fake for `torch.compile`, gradients to the input and the bias, and autocast. Weights are lists of tensors in the
order of `LayerShape.names`, either as stored (``layout="stored"``) or as the Triton kernels read them (``"kernel"``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from optimum_sab.ops.backends import backend_name
from optimum_sab.ops.cpu.direct import direct_linear, only_values
from optimum_sab.ops.cpu.kernel import dequantize as cpu_dequantize
from optimum_sab.ops.cpu.kernel import linear_of as cpu_linear
from optimum_sab.ops.operands import (
    WEIGHT,
    Weight,
    cast_under_autocast,
    kernel_dtype,
    library,
    no_gradients,
    refuse_forward_mode,
)
from optimum_sab.ops.reference import binary_linear as reference_linear
from optimum_sab.ops.shape import LayerShape

library.define(f"binary_linear(Tensor x, Tensor? bias, {WEIGHT}) -> Tensor")
library.define(f"stacked_linear(Tensor x, Tensor[] biases, int[] sizes, {WEIGHT}) -> Tensor[]")
library.define(f"binary_linear_transposed(Tensor grad, {WEIGHT}) -> Tensor")


def binary_linear(
    x: Tensor,
    tensors: Sequence[Tensor],
    shape: LayerShape | str,
    bias: Tensor | None = None,
    layout: str = "stored",
    backend: str | None = None,
) -> Tensor:
    """``y = x Ŵᵀ + b`` through the operator.

    Args:
        x: [..., in], floating.
        tensors: the layer's, in the order of ``shape.names``.
        shape: of the layer, or its `text`, of which `torch.compile` has less to guard.
        bias: [out] or None.
        layout: of the tensors, ``"stored"`` or ``"kernel"``.
        backend: what computes (ops/backends.py); None or "auto" leaves it to the device.

    Returns:
        [..., out] in x's dtype (under autocast, in its dtype).

    Raises:
        ConfigError: x is not floating, its last dimension is not ``in``, it is on another device than the weight, or
            the weight is on meta; or the backend cannot be used.
        NotImplementedError: x carries a forward-mode derivative.
    """
    refuse_forward_mode(x)
    return torch.ops.optimum_sab.binary_linear(x, bias, tensors, layout, backend, _text(shape))


def stacked_linear(
    x: Tensor,
    tensors: Sequence[Tensor],
    shape: LayerShape | str,
    sizes: Sequence[int],
    biases: Sequence[Tensor] = (),
    backend: str | None = None,
) -> list[Tensor]:
    """`binary_linear` of layers stacked by rows in the kernel layout: one output [..., size] for each of ``sizes``.

    Biases get no gradient here.
    """
    refuse_forward_mode(x)
    return torch.ops.optimum_sab.stacked_linear(x, biases, sizes, tensors, "kernel", backend, _text(shape))


def _text(shape: LayerShape | str) -> str:
    return shape if isinstance(shape, str) else shape.text


# -- values ------------------------------------------------------------------------------------------------------------


def _forward(x: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    found = _direct(x, bias, *arguments)
    if found is not None:
        return found
    weight = Weight.of(*arguments)
    weight.check(x)
    shape = weight.shape
    name = backend_name(x.device, weight.backend)
    rows = x if x.dim() == 2 else x.reshape(-1, shape.in_features)
    if name == "triton":
        from sab_kernels import binary_linear as triton_linear

        out = triton_linear(rows.to(kernel_dtype(x)), weight.for_kernels(), shape.geometry, bias)
    elif name == "cpu":
        dtype = kernel_dtype(x)
        out = cpu_linear(rows if x.dtype is dtype else rows.to(dtype), weight.stored(), shape, bias)
    else:
        out = reference_linear(rows, weight.packed(), bias)
    if out.dtype is not x.dtype:
        out = out.to(x.dtype)
    return out if x.dim() == 2 else _shaped(out, x)


def _direct(
    x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor], layout: str, backend: str | None, shape: str
) -> Tensor | None:
    """What the operator computes, where nobody but C is to be asked, or None."""
    return direct_linear(shape).of(x, tensors, bias, backend) if layout == "stored" and only_values(x) else None


def _stacked(x: Tensor, biases: list[Tensor], sizes: list[int], *arguments: Any) -> list[Tensor]:
    weight = Weight.of(*arguments)
    weight.check(x)
    if backend_name(x.device, weight.backend) != "triton":
        whole = _forward(x, torch.cat(biases) if biases else None, *arguments)
        return [part.clone(memory_format=torch.contiguous_format) for part in whole.split(sizes, -1)]
    from sab_kernels import stacked_linear as triton_linear

    rows = x.reshape(-1, weight.shape.in_features).to(kernel_dtype(x))
    parts = triton_linear(rows, weight.for_kernels(), weight.shape.geometry, tuple(sizes), biases)
    return [_shaped(part.to(x.dtype), x) for part in parts]


def _transposed(grad: Tensor, *arguments: Any) -> Tensor:
    weight = Weight.of(*arguments)
    rows = grad.reshape(-1, weight.shape.out_features)
    name = backend_name(grad.device, weight.backend)
    if name == "triton":
        from sab_kernels import dequantize as triton_dequantize

        dense = triton_dequantize(weight.for_kernels(), weight.shape.geometry, kernel_dtype(grad))
    elif name == "cpu":
        dense = cpu_dequantize(weight.packed(), torch.float32)
    else:
        dense = weight.packed().dequantize()
    out = rows.to(dense.dtype) @ dense
    return _shaped(out.to(grad.dtype), grad)


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """Rows in the leading shape of the input. No view, which autograd would not let a model change in place."""
    return torch.ops.aten._unsafe_view.default(rows, [*like.shape[:-1], rows.shape[-1]])


for _name, _function in (
    ("binary_linear", _forward),
    ("stacked_linear", _stacked),
    ("binary_linear_transposed", _transposed),
):
    library.impl(_name, _function, "CompositeExplicitAutograd")


# -- shapes ------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("optimum_sab::binary_linear")
def _(x: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    weight = Weight.of(*arguments)
    weight.check(x)
    return x.new_empty(*x.shape[:-1], weight.shape.out_features)


@torch.library.register_fake("optimum_sab::stacked_linear")
def _(x: Tensor, biases: list[Tensor], sizes: list[int], *arguments: Any) -> list[Tensor]:
    Weight.of(*arguments).check(x)
    return [x.new_empty(*x.shape[:-1], size) for size in sizes]


@torch.library.register_fake("optimum_sab::binary_linear_transposed")
def _(grad: Tensor, *arguments: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], Weight.of(*arguments).shape.in_features)


# -- gradients ---------------------------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    """Nothing dense is kept: the weight is made dense again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, below: Callable[..., Tensor], x: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
        ctx.arguments = arguments
        ctx.bias_dtype = None if bias is None else bias.dtype
        return below(x, bias, *arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        _, wanted, bias_wanted, *_ = ctx.needs_input_grad
        (grad,) = grads
        x_grad = torch.ops.optimum_sab.binary_linear_transposed(grad, *ctx.arguments) if wanted else None
        bias_grad = None
        if bias_wanted:
            bias_grad = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return None, x_grad, bias_grad, *[None] * len(ctx.arguments)


def _with_gradients(keys: torch._C.DispatchKeySet, x: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    """The operator at PyTorch's Autograd key, where it arrives first.

    `torch.library.register_autograd` would do, but asks the dispatcher once more at every call, which costs as much as
    the whole way to C.
    """
    found = _direct(x, bias, *arguments)
    if found is not None:
        return found

    def below(*arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            operator = torch.ops.optimum_sab.binary_linear.default
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(below, x, bias, *arguments)
    return below(x, bias, *arguments)


def _keep_stacked(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, ctx.biases, *ctx.arguments = inputs


def _stacked_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    sizes, *arguments = ctx.arguments
    x_grad = None
    if ctx.needs_input_grad[0]:
        like = next(g for g in grads if g is not None)
        filled = [like.new_zeros(*like.shape[:-1], n) if g is None else g for g, n in zip(grads, sizes)]
        x_grad = torch.ops.optimum_sab.binary_linear_transposed(torch.cat(filled, -1), *arguments)
    return x_grad, *no_gradients((ctx.biases, *ctx.arguments))


library.impl("binary_linear", _with_gradients, "Autograd", with_keyset=True)
torch.library.register_autograd(
    "optimum_sab::stacked_linear", _stacked_backward, setup_context=_keep_stacked, lib=library
)


for _name in ("binary_linear", "stacked_linear"):
    cast_under_autocast(_name)


def operator_names() -> tuple[str, ...]:
    """Qualified names of the operators."""
    return tuple(f"optimum_sab::{name}" for name in ("binary_linear", "stacked_linear", "binary_linear_transposed"))
