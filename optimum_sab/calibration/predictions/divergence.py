"""How far next-token predictions are from others."""

from __future__ import annotations

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
    pairs = zip(student.split(ROWS), teacher.split(ROWS), strict=True)
    return torch.cat([divergence(mine, wanted) for mine, wanted in pairs])
