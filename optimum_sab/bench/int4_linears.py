"""Random linears of torch's own int4 kernel for the CPU, for comparison: one ±1 plane with a row scale per 128 columns.

That is the base plane of our default layer alone, which the kernel represents exactly: codes 7 and 9 around 8. Column
scales and the residual plane would come on top.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optimum_sab.bench.shapes import LinearShape
from optimum_sab.errors import ConfigError
from optimum_sab.format.random_weight import SCALE

GROUP_SIZE = 128


def check_int4(device: torch.device, dtype: torch.dtype) -> None:
    """Whether torch's int4 kernel can be measured here.

    Raises:
        ConfigError: the device is no CPU, or the dtype is not bfloat16.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        raise ConfigError(f"--int4 is measured on the CPU in bfloat16, not on {device.type} in {dtype}.")


def supports(shape: LinearShape) -> bool:
    """Whether the kernel takes this shape."""
    return shape.in_features % GROUP_SIZE == 0 and shape.out_features % 16 == 0


def int4_linear(shape: LinearShape, seed: int) -> Callable[[Tensor], Tensor]:
    """x bf16 [tokens, in] → [tokens, out]."""
    codes, scales = _content(shape, seed)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    pairs = torch.stack([scales.T, torch.zeros_like(scales.T)], -1).contiguous()  # scale and zero, [groups, out, 2]
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, pairs)


def int4_weight(shape: LinearShape, seed: int) -> Tensor:
    """The dense fp32 weight [out, in] of `int4_linear` with the same arguments."""
    codes, scales = _content(shape, seed)
    return (codes - 8).float() * scales.float().repeat_interleave(GROUP_SIZE, 1)


def int4_bytes(shape: LinearShape) -> int:
    """Bytes of the packed codes and of scales and zeros."""
    return shape.out_features * shape.in_features // 2 + 4 * shape.out_features * shape.in_features // GROUP_SIZE


def _content(shape: LinearShape, seed: int) -> tuple[Tensor, Tensor]:
    """Codes int32 [out, in], 7 or 9, and scales bf16 [out, in / 128]."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.out_features, shape.in_features)
    codes = torch.randint(0, 2, size, dtype=torch.int32, generator=generator) * 2 + 7
    scales = SCALE * (0.5 + torch.rand(size[0], size[1] // GROUP_SIZE, generator=generator))
    return codes, scales.bfloat16()
