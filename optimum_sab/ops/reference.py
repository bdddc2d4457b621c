"""The slow truth: a linear with a packed weight, computed from the dequantized fp32 weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from optimum_sab.errors import ConfigError
from optimum_sab.format.packed_weight import PackedWeight

if TYPE_CHECKING:
    from torch import Tensor


class _BinaryLinear(torch.autograd.Function):
    """``x Ŵᵀ`` in fp32. Nothing dense is kept for the backward pass: the weight is dequantized again."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, packed: PackedWeight) -> Tensor:
        ctx.packed = packed
        return (inputs.float() @ packed.dequantize().T).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad.float() @ ctx.packed.dequantize()).to(grad.dtype), None


def binary_linear(inputs: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``y = x Ŵᵀ + b`` with gradients to x.

    Args:
        inputs: x [..., in], float32, bfloat16 or float16; computed in fp32, returned in x's dtype.
        packed: Ŵ.
        bias: b [out] or None.

    Raises:
        ConfigError: x is not floating or its last dimension is not ``in``.
    """
    check_input(inputs, packed.in_features)
    output: Tensor = _BinaryLinear.apply(inputs, packed)
    return output if bias is None else output + bias.to(output.dtype)


def check_input(inputs: Tensor, in_features: int) -> None:
    """Refuse what no packed linear takes.

    Raises:
        ConfigError: x is not floating or its last dimension is not ``in_features``.
    """
    if not inputs.is_floating_point():
        raise ConfigError(f"the input is {inputs.dtype}; a packed linear takes float32, bfloat16 or float16.")
    if inputs.dim() == 0 or inputs.shape[-1] != in_features:
        width = inputs.shape[-1] if inputs.dim() else "missing"
        raise ConfigError(f"the input's last dimension is {width}, the layer takes {in_features}.")
