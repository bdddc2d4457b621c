"""How large weights are: what scales can hold, and where fp32 has room for the squares of extreme ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.row_scale import EXPONENT_RANGE, FP8_MAX
from optimum_sab.errors import ConfigError, NonFiniteError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

ORDINARY = 40  # powers of two, up and down, within which nothing is rescaled
HELD = {  # row scales that a storage holds with three bits behind the leading one
    "fp8": (2.0 ** (EXPONENT_RANGE[0] - 6), FP8_MAX * 2.0 ** EXPONENT_RANGE[1]),
    "fp16": (2.0**-21, 65504.0),
}


def check_magnitude(weight: Float[Tensor, "out in"], storage: str, name: str) -> None:
    """Refuse a weight that is damaged, or whose row scales could not be stored.

    Args:
        weight: any float dtype.
        storage: of the row scales, "fp8" or "fp16".
        name: the module's, for messages.

    Raises:
        NonFiniteError: it holds NaN or inf.
        ConfigError: the mean magnitude of its largest row is outside of what ``storage`` holds; zero is held.
    """
    weight = weight.detach()
    sums = torch.linalg.vector_norm(weight, 1, 1, dtype=torch.float32)
    largest = float(sums.max()) / weight.shape[1]
    if not math.isfinite(largest):
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(
                f"the weight of {name} holds NaN or inf; the checkpoint is damaged, or overflowed in float16."
            )
        largest = float(weight.abs().max())  # only the sum was too large
    least, most = HELD[storage]
    if largest and not least <= largest <= most:
        other = "row_scale='fp8', or " if storage == "fp16" and HELD["fp8"][0] <= largest <= HELD["fp8"][1] else ""
        raise ConfigError(
            f"the weight of {name} has a magnitude of {largest:.2g}, and row scales stored as {storage} hold "
            f"{least:.2g} to {most:.2g}; use {other}modules_to_not_convert={[name]!r} to leave it dense."
        )


def extreme_power(weight: Float[Tensor, "out in"]) -> int:
    """The power of two by which to divide before squares overflow or vanish; 0 for ordinary weights."""
    peak = float(weight.abs().max())
    power = math.frexp(peak)[1] if peak else 0
    return power if abs(power) > ORDINARY else 0


def times_power(values: Tensor, power: int) -> Tensor:
    """``values · 2^power``, exact where fp32 holds it."""
    return (values.double() * 2.0**power).float()


def with_outputs_scaled(statistics: InputStatistics, power: int) -> InputStatistics:
    """The statistics of a linear whose weight, and whatever its output is added to, is multiplied by ``2^power``."""
    if statistics.residual is None:
        return statistics
    half = statistics.half
    if half is not None and half.residual is not None:
        half = replace(half, residual=times_power(half.residual, power))
    return replace(statistics, residual=times_power(statistics.residual, power), half=half)
