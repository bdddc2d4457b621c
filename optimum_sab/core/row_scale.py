"""Rounding of scales to their stored precision, so that the solver aims at what the file will hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

FP8_MAX = 448.0  # largest finite e4m3
EXPONENT_RANGE = (-126, 119)  # 2**e and 448 * 2**e stay normal in fp32 and bf16


def row_exponent(row_scale: Float[Tensor, "planes blocks out"]) -> Int[Tensor, " out"]:
    """Smallest power of two per row, as int8, under which every scale of the row fits e4m3's range."""
    peak = row_scale.abs().amax((0, 1))
    exponent = torch.ceil(torch.log2(peak.clamp_min(2.0**-140) / FP8_MAX))
    return exponent.clamp(*EXPONENT_RANGE).to(torch.int8)


def round_row_scale(row_scale: Float[Tensor, "planes blocks out"], storage: str) -> Float[Tensor, "planes blocks out"]:
    """The fp32 values that ``storage`` ("fp8": e4m3 times a power of two per row, or "fp16") gives back."""
    if storage == "fp8":
        unit = torch.exp2(row_exponent(row_scale).float())
        return (row_scale / unit).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * unit
    return row_scale.clamp(-65504.0, 65504.0).half().float()


def round_column_scale(column_scale: Float[Tensor, " in"]) -> Float[Tensor, " in"]:
    """Column scales are stored in fp16; they are near 1 by construction (their mean over a block is 1)."""
    return column_scale.half().float()
