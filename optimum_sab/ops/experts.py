"""`optimum_sab::experts_linear`: products of routed rows with a stack of packed experts as one PyTorch operator.

With a fake for `torch.compile`, gradients to the input and the bias, and autocast, as `operator.py` has them for one
layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimum_sab.errors import ConfigError
from optimum_sab.ops.backends import backend_name
from optimum_sab.ops.cpu.direct import only_values
from optimum_sab.ops.cpu.experts import direct_experts
from optimum_sab.ops.cpu.experts import experts_linear_of as cpu_experts
from optimum_sab.ops.cpu.kernel import dequantize as cpu_dequantize
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

library.define(f"experts_linear(Tensor x, Tensor experts, Tensor? bias, int repeats, {WEIGHT}) -> Tensor")
library.define(f"experts_linear_transposed(Tensor grad, Tensor experts, int repeats, {WEIGHT}) -> Tensor")


@dataclass(frozen=True)
class ExpertWeights:
    """Packed layers of one shape, stacked.

    Attributes:
        tensors: those of all experts, [E, ...] each, in the order of ``shape.names``.
        shape: of one expert.
        bias: [E, out] or None.
        layout: of the tensors, ``"stored"`` or ``"kernel"``.
        backend: what computes (ops/backends.py); None or "auto" leaves it to the device.
    """

    tensors: Sequence[Tensor]
    shape: LayerShape
    bias: Tensor | None = None
    layout: str = "stored"
    backend: str | None = None


def experts_linear(x: Tensor, experts: Tensor, weights: ExpertWeights, repeats: int = 1) -> Tensor:
    """``y[s] = x[s // repeats] Ŵ[e]ᵀ + b[e]`` with ``e = experts[s]``, through the operator.

    Args:
        x: [pairs // repeats, in], floating.
        experts: [pairs], int64 or int32, in any order; where it is none of 0 .. E − 1, the row of y is 0.
        weights: Ŵ and b.
        repeats: pairs that read the same row of x: the experts of a token for its first matrix, 1 for the second.

    Returns:
        [pairs, out] in x's dtype (under autocast, in its dtype).

    Raises:
        ConfigError: x, experts, bias or tensors have another shape, dtype or device, ``repeats`` is below 1, the weight
            is on meta, or the backend cannot be used.
        FormatError: a stored tensor is not as the format says (on the CPU).
        NotImplementedError: x carries a forward-mode derivative.
    """
    tensors, shape, bias = weights.tensors, weights.shape, weights.bias
    if weights.layout == "stored" and weights.backend in (None, "auto", "cpu") and only_values(x):
        found = direct_experts(x, experts, tensors, shape, bias, repeats)
        if found is not None:
            return found
    refuse_forward_mode(x)
    layout, backend = weights.layout, weights.backend
    return torch.ops.optimum_sab.experts_linear(x, experts, bias, repeats, tensors, layout, backend, shape.text)


# -- checks ------------------------------------------------------------------------------------------------------------


def _check(x: Tensor, experts: Tensor, bias: Tensor | None, repeats: int, weight: Weight) -> int:
    """Refuse what does not fit together; the number of experts."""
    shape = weight.shape
    if len(weight.tensors) != len(shape.names):
        raise ConfigError(
            f"experts have {len(shape.names)} tensors ({', '.join(shape.names)}), not {len(weight.tensors)}."
        )
    weight.check(x)
    if experts.dtype not in (torch.int64, torch.int32):
        raise ConfigError(f"experts are {experts.dtype}; they are chosen by an int64 or int32 tensor.")
    if repeats < 1:
        raise ConfigError(f"repeats={repeats} must be at least 1: how many pairs read the same row.")
    if x.dim() != 2 or experts.dim() != 1 or experts.shape[0] != x.shape[0] * repeats:
        raise ConfigError(
            f"the input is {list(x.shape)} and experts are {list(experts.shape)}; with repeats={repeats} the input is "
            f"[rows, {shape.in_features}] and experts are [{repeats} · rows]."
        )
    counts = [tensor.shape[0] if tensor.dim() else 0 for tensor in weight.tensors]
    if any(count != counts[0] for count in counts):  # no set: traced sizes have no hash
        told = ", ".join(f"{name} {count}" for name, count in zip(shape.names, counts))
        raise ConfigError(f"the tensors are of different numbers of experts: {told}.")
    if bias is not None and (list(bias.shape) != [counts[0], shape.out_features] or not bias.is_floating_point()):
        raise ConfigError(
            f"the bias is {bias.dtype} {list(bias.shape)}; {counts[0]} experts take floats "
            f"[{counts[0]}, {shape.out_features}]."
        )
    for name, tensor in (("experts", experts), ("the bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ConfigError(f"{name} on {tensor.device} and the input on {x.device} cannot meet; move one of them.")
    return counts[0]


# -- values ------------------------------------------------------------------------------------------------------------


def _forward(x: Tensor, experts: Tensor, bias: Tensor | None, repeats: int, *arguments: Any) -> Tensor:
    weight = Weight.of(*arguments)
    count = _check(x, experts, bias, repeats, weight)
    name = backend_name(x.device, weight.backend)
    if name == "triton":
        from sab_kernels import experts_linear as triton_experts

        rows = x.to(kernel_dtype(x))
        out = triton_experts(rows, experts, _for_kernels(weight, count), weight.shape.geometry, bias, repeats)
    elif name == "cpu":
        out = cpu_experts(x.to(kernel_dtype(x)), experts, _stored(weight, count), weight.shape, bias, repeats)
    else:
        out = x.new_zeros(experts.shape[0], weight.shape.out_features)
        for expert, pairs in _runs(experts, count):
            own = None if bias is None else bias[expert]
            out[pairs] = reference_linear(x[pairs // repeats], weight.member(expert).packed(), own)
    return out.to(x.dtype)


def _transposed(grad: Tensor, experts: Tensor, repeats: int, *arguments: Any) -> Tensor:
    """Gradients to x: the weight of one expert at a time is dense."""
    weight = Weight.of(*arguments)
    name = backend_name(grad.device, weight.backend)
    pulled = grad.new_zeros(grad.shape[0], weight.shape.in_features, dtype=torch.float32)
    for expert, pairs in _runs(experts, weight.tensors[0].shape[0]):
        dense = _dense(weight.member(expert), name, kernel_dtype(grad))
        pulled[pairs] = (grad[pairs].to(dense.dtype) @ dense).float()
    return pulled.view(-1, repeats, weight.shape.in_features).sum(1).to(grad.dtype)


def _dense(weight: Weight, name: str, dtype: torch.dtype) -> Tensor:
    """One expert's [out, in]."""
    if name == "triton":
        from sab_kernels import dequantize as triton_dequantize

        return triton_dequantize(weight.for_kernels(), weight.shape.geometry, dtype)
    return cpu_dequantize(weight.packed()) if name == "cpu" else weight.packed().dequantize()


def _runs(experts: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """Every expert that has pairs, in order, and the numbers of its pairs. Waits for the device."""
    order = experts.argsort(stable=True)
    kinds, sizes = experts[order].unique_consecutive(return_counts=True)
    for expert, pairs in zip(kinds.tolist(), order.split(sizes.tolist())):
        if 0 <= expert < count:
            yield expert, pairs


def _for_kernels(weight: Weight, count: int) -> dict[str, Tensor]:
    if weight.layout == "kernel":
        return weight.for_kernels()
    layers = [weight.member(expert).for_kernels() for expert in range(count)]  # offloaded experts: at every call
    return {name: torch.stack([layer[name] for layer in layers]) for name in weight.shape.names}


def _stored(weight: Weight, count: int) -> Sequence[Tensor]:
    if weight.layout == "stored":
        return weight.tensors
    layers = [weight.member(expert).stored() for expert in range(count)]
    return [torch.stack(tensors) for tensors in zip(*layers)]


library.impl("experts_linear", _forward, "CompositeExplicitAutograd")
library.impl("experts_linear_transposed", _transposed, "CompositeExplicitAutograd")


# -- shapes ------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("optimum_sab::experts_linear")
def _(x: Tensor, experts: Tensor, bias: Tensor | None, repeats: int, *arguments: Any) -> Tensor:
    weight = Weight.of(*arguments)
    _check(x, experts, bias, repeats, weight)
    return x.new_empty(experts.shape[0], weight.shape.out_features)


@torch.library.register_fake("optimum_sab::experts_linear_transposed")
def _(grad: Tensor, experts: Tensor, repeats: int, *arguments: Any) -> Tensor:
    return grad.new_empty(grad.shape[0] // repeats, Weight.of(*arguments).shape.in_features)


# -- gradients ---------------------------------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Nothing dense is kept: weights are made dense again in the backward pass."""
    _, experts, bias, ctx.repeats, *ctx.arguments = inputs
    ctx.save_for_backward(experts)
    wanted = isinstance(bias, Tensor) and bias.requires_grad
    ctx.bias_shape, ctx.bias_dtype = (bias.shape, bias.dtype) if wanted else (None, None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (experts,) = ctx.saved_tensors
    x_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        operator = torch.ops.optimum_sab.experts_linear_transposed
        x_grad = operator(grad.contiguous(), experts, ctx.repeats, *ctx.arguments)
    if ctx.bias_dtype is not None:
        inside = (experts >= 0) & (experts < ctx.bias_shape[0])
        parts = grad.float().masked_fill(~inside[:, None], 0.0)
        bias_grad = parts.new_zeros(ctx.bias_shape).index_add(0, experts.where(inside, 0), parts).to(ctx.bias_dtype)
    return x_grad, None, bias_grad, None, *no_gradients(ctx.arguments)


torch.library.register_autograd("optimum_sab::experts_linear", _backward, setup_context=_keep, lib=library)
cast_under_autocast("experts_linear")
