"""What a baseline gives back, and the accounting of its bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optimum_sab.errors import NonFiniteError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SCALE_BITS = 16  # every scale and offset of these methods is stored in fp16


@dataclass(frozen=True)
class Simulated:
    """A baseline's result: the dense weight [out, in] it stands for, and the bits per weight its storage takes.

    Grids that codes are rounded to are rounded to fp16 first. The scales of sign planes are counted as fp16 and kept in
    fp32: what the rounding adds is at most 2⁻²² of a weight's energy.
    """

    weight: Tensor
    bits_per_weight: float


@dataclass
class Storage:
    """Adds up all that a decoder needs to rebuild a weight, in bits.

    Attributes:
        out_features: rows.
        in_features: columns.
        bits: so far.
    """

    out_features: int
    in_features: int
    bits: float = 0.0

    def signs(self, columns: int, planes: int = 1) -> None:
        """One bit per entry of ``columns`` columns and per plane."""
        self.bits += self.out_features * columns * planes

    def bitmap(self, columns: int) -> None:
        """One bit per entry: which of two groups it belongs to."""
        self.bits += self.out_features * columns

    def column_bitmap(self, columns: int) -> None:
        """One bit per column: salient or not."""
        self.bits += columns

    def row_scales(self, count: int) -> None:
        """``count`` fp16 numbers per row."""
        self.bits += SCALE_BITS * self.out_features * count

    def column_scales(self, columns: int) -> None:
        """One fp16 number per column."""
        self.bits += SCALE_BITS * columns

    def codes(self, entries: float, bits: int) -> None:
        """``entries`` integers of ``bits`` bits."""
        self.bits += entries * bits

    @property
    def per_weight(self) -> float:
        return self.bits / (self.out_features * self.in_features)


def fp16_step(step: Tensor) -> Tensor:
    """The step of a grid as fp16 stores it, and never zero: a row of zeros has a grid too."""
    return step.clamp_min(torch.finfo(torch.float16).smallest_normal).half().float()


def checked(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The weight in fp32.

    Raises:
        NonFiniteError: it holds NaN or inf.
    """
    W = weight.detach().float()
    if not bool(W.isfinite().all()):
        raise NonFiniteError("the weight holds NaN or inf; the checkpoint is damaged or overflowed in float16.")
    return W
