"""How far next-token predictions are from others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

ROWS = 32  # tokens gone through at a time: their logits stay in the cache, and little is made beside them


def divergence(
    student: Float[Tensor, "tokens vocabulary"], teacher: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, " tokens"]:
    """``KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)`` per token, p the teacher's and q the student's, from logits, fp32."""
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def divergences(
    student: Float[Tensor, "tokens vocabulary"], teacher: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, " tokens"]:
    """`divergence`, some tokens at a time; for gradients it saves nothing."""
    return in_turns(divergence, (student, teacher), torch.float32)


def in_turns(function: Callable[..., Tensor], rows: Sequence[Tensor], dtype: torch.dtype, *shape: int) -> Tensor:
    """``function`` of `ROWS` rows after the other.

    What it gives is written into memory that is there before: a list of its results keeps glibc from using again what
    lies below each, so that a process grows by all that was made on the way (findings/torch-small-results-pin.sh).

    Args:
        function: of some of the rows, to what each of them gives.
        rows: tensors [rows, ...] of which it is given the same ones.
        dtype: of that.
        shape: of what a row gives; nothing for a number.

    Returns:
        [rows, *shape].
    """
    found = rows[0].new_empty(len(rows[0]), *shape, dtype=dtype)
    for start in range(0, len(found), ROWS):
        some = slice(start, start + ROWS)
        found[some] = function(*(each[some] for each in rows))
    return found
