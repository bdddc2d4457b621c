"""The propagated target: aim at the dense stream's output from the quantized stream's input (QEP, 2504.09629)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def propagated_target(
    weight: Float[Tensor, "out in"],
    inverse: Float[Tensor, "in in"],
    drift: Float[Tensor, "in in"],
    alpha: float,
) -> Float[Tensor, "out in"]:
    """``W* = W + α W C H⁻¹`` with ``C = (X − X̂)ᵀ X̂`` and ``H = X̂ᵀ X̂`` damped.

    At α = 1 this is the ridge least-squares map from the quantized stream's inputs to the dense outputs; smaller
    values overfit less (docs/method.md has the measurements).
    """
    return weight + alpha * ((weight @ drift) @ inverse)
