"""Is what is timed also right? A benchmark of a wrong kernel is worthless."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optimum_sab.errors import SABError

# On `relative_error`. bfloat16 and float16 leave room for a weight and an output rounded to the dtype, float32 for
# tensor-float products.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 4e-3, torch.float32: 1e-3}


class WrongResultError(SABError, RuntimeError):
    """What a benchmark was to time computes something else, or NaN."""


def relative_error(output: Tensor, expected: Tensor) -> float:
    """``max over tokens of ‖y − ŷ‖ / ‖ŷ‖`` for outputs [tokens, out]; NaN where the output holds one."""
    difference = (output.float() - expected.float()).norm(dim=-1)
    return float((difference / expected.float().norm(dim=-1)).amax())


def linear_error(linear: Callable[[Tensor], Tensor], inputs: Tensor, weight: Tensor) -> float:
    """`relative_error` of ``linear(inputs)`` [tokens, out] against ``inputs @ weight.T`` in fp32."""
    expected = inputs.float() @ weight.float().T
    # freed at once, so that the allocator is likely to hand this memory to the output: what a kernel leaves unwritten
    # is then NaN, and not the right answer of an earlier call
    torch.full(expected.shape, torch.nan, dtype=inputs.dtype, device=inputs.device)
    return relative_error(linear(inputs), expected)


def check_error(error: float, dtype: torch.dtype, what: str) -> None:
    """Refuse an error above the tolerance of the dtype.

    Raises:
        WrongResultError: with ``what`` and both numbers.
    """
    if not error <= TOLERANCE[dtype]:  # NaN must not pass
        raise WrongResultError(
            f"{what} is off by {error:.2g} of the output's norm, more than the {TOLERANCE[dtype]:g} that {dtype} "
            "explains; a time would mean nothing. Choose another --backend and report this shape."
        )
