"""The propagated target: aim at the dense stream from the quantized stream's input (after QEP, 2504.09629)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optimum_sab.core.hessian import FactoredHessian, InputStatistics, solve_damped

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def propagated_target(
    weight: Float[Tensor, "out in"],
    inverse: Float[Tensor, "in in"],
    drift: Float[Tensor, "in in"] | None,
    alpha: float,
    residual: Float[Tensor, "out in"] | None = None,
) -> Float[Tensor, "out in"]:
    """``W* = W + α (W C + R) H⁻¹`` with ``C = (X − X̂)ᵀ X̂``, ``R = (r − r̂)ᵀ X̂`` and ``H = X̂ᵀ X̂`` damped.

    At α = 1 this is the ridge least-squares map from the quantized stream's inputs to the dense outputs ``X Wᵀ``, plus,
    where R is given, to what the two streams already differ by in the residual r that the output is added to: the
    linear aims at the dense stream behind the addition. Smaller values overfit less (docs/method.md has the
    measurements). Without C, R is the sum of both.
    """
    return weight + alpha * (_correction(weight, drift, residual) @ inverse)


def target_of(
    weight: Float[Tensor, "out in"], statistics: InputStatistics, factored: FactoredHessian, alpha: float
) -> Float[Tensor, "out in"]:
    """What a weight's planes aim at: `propagated_target` where there are two streams, 0 where inputs are always 0."""
    target = weight
    if alpha and statistics.two_streams:
        target = propagated_target(weight, factored.inverse, statistics.drift, alpha, statistics.residual)
    return target.masked_fill(factored.dead, 0.0)


def cross_validated_alpha(
    weight: Float[Tensor, "out in"], statistics: InputStatistics, damping: float, name: str = "the layer"
) -> float:
    """The α that one half of the samples asks for when the correction comes from the other half.

    With ``D = (W C + R) H⁻¹`` from half A, the error on half B is least at ``α = ⟨D, W C_B + R_B⟩ / ⟨D H_B, D⟩``. Both
    ways round are averaged to ``h`` in [0, 1]. From all samples D has half the noise, so what is used is
    ``2 h / (1 + h)``, the shrinkage ``s/(s + v/2)`` where halves show ``h = s/(s + v)``.

    Args:
        weight: W.
        statistics: of two streams, with ``half``.
        damping: as in `factor_hessian`.
        name: the module's name, for messages.

    Returns:
        α in [0, 1]; 0 where the streams do not differ.
    """
    assert statistics.half is not None
    halves = statistics.half, statistics.whole.without(statistics.half)
    if not all(bool(half.hessian.diagonal().any()) for half in halves):
        return 0.0
    corrections = [_correction(weight, half.drift, half.residual) for half in halves]
    found = []
    for here, there in ((0, 1), (1, 0)):
        D = solve_damped(corrections[here], halves[here].hessian, damping, name)
        above = float((D * corrections[there]).sum(dtype=torch.float64))
        below = float((D @ halves[there].hessian * D).sum(dtype=torch.float64))
        found.append(above / below if below > 0 else 0.0)
    h = min(1.0, max(0.0, sum(found) / 2))
    return 2 * h / (1 + h)


def _correction(weight: Tensor, drift: Tensor | None, residual: Tensor | None) -> Tensor:
    """``W C + R``; R is all of it without C."""
    if drift is None:
        assert residual is not None
        return residual
    return weight @ drift if residual is None else weight @ drift + residual
