"""The propagated target: aim at the dense stream from the quantized stream's input (after QEP, 2504.09629)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.factorization import WIDE, FactoredHessian, solve_damped
from optimum_sab.core.hessian import InputStatistics, WeightedMoments

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SKETCH = 256  # rows of a weight from whose random combinations α is found


def propagated_target(
    weight: Float[Tensor, "out in"],
    times_inverse: Callable[[Float[Tensor, "out in"]], Float[Tensor, "out in"]],
    drift: Float[Tensor, "in in"] | None,
    alpha: float,
    residual: Float[Tensor, "out in"] | None = None,
) -> Float[Tensor, "out in"]:
    """``W* = W + α (W C + R) H⁻¹`` with ``C = (X − X̂)ᵀ X̂``, ``R = (r − r̂)ᵀ X̂`` and ``H = X̂ᵀ X̂`` damped.

    At α = 1 this is the ridge least-squares map from the quantized stream's inputs to the dense outputs ``X Wᵀ``, plus,
    where R is given, to what the two streams already differ by in the residual r that the output is added to: the
    linear aims at the dense stream behind the addition. Smaller values overfit less (docs/method.md has the
    measurements). Without C, R is the sum of both.

    Args:
        weight: W.
        times_inverse: gives ``B H⁻¹`` of B.
        drift: C.
        alpha: α.
        residual: R.
    """
    return weight + alpha * times_inverse(_correction(weight, drift, residual))


def target_of(
    weight: Float[Tensor, "out in"], statistics: InputStatistics, factored: FactoredHessian, alpha: float
) -> Float[Tensor, "out in"]:
    """What a weight's planes aim at: `propagated_target` where there are two streams, 0 where inputs are always 0."""
    target = weight
    if alpha and statistics.two_streams:
        target = propagated_target(weight, factored.times_inverse, statistics.drift, alpha, statistics.residual)
    return target.masked_fill(factored.dead, 0.0)


def cross_validated_alpha(
    weight: Float[Tensor, "out in"], statistics: InputStatistics, damping: float, name: str = "the layer"
) -> float:
    """The α that one half of the samples asks for when the correction comes from the other half.

    With ``D = (W C + R) H⁻¹`` from half A, the error on half B is least at ``α = ⟨D, W C_B + R_B⟩ / ⟨D H_B, D⟩``. Both
    ways round are averaged to ``h`` in [0, 1]. From all samples D has half the noise, so what is used is
    ``2 h / (1 + h)``, the shrinkage ``s/(s + v/2)`` where halves show ``h = s/(s + v)``.

    Both are sums over W's rows. From `WIDE` inputs on they are taken over `SKETCH` random combinations of the rows
    instead, which cost that much less and leave either sum as it is on average (`sketch_rows`); α is then off by about
    a hundredth (docs/method.md).

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
    corrections = _few_corrections(weight, halves)
    found = []
    for here, there in ((0, 1), (1, 0)):
        D = solve_damped(corrections[here], halves[here].hessian, damping, name)
        above = float((D * corrections[there]).sum(dtype=torch.float64))
        below = float((D @ halves[there].hessian * D).sum(dtype=torch.float64))
        found.append(above / below if below > 0 else 0.0)
    h = min(1.0, max(0.0, sum(found) / 2))
    return 2 * h / (1 + h)


def sketch_rows(matrix: Float[Tensor, "out in"], rows: int) -> Float[Tensor, "rows in"]:
    """``S M`` with S of one random sign in every column, always the same: ``E tr(S A Sᵀ) = tr A``.

    Args:
        matrix: M.
        rows: of S.
    """
    generator, out = _generator(), matrix.shape[0]
    sign = torch.randint(0, 2, (out, 1), generator=generator).mul_(2).sub_(1)
    place = torch.randperm(out, generator=generator).remainder_(rows)
    found = matrix.new_zeros(rows, matrix.shape[1])
    return found.index_add_(0, place.to(matrix.device), matrix * sign.to(matrix.device, matrix.dtype))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _few_corrections(weight: Tensor, halves: tuple[WeightedMoments, ...]) -> list[Tensor]:
    """`_correction` of each half, sketched where that pays."""
    out, width = weight.shape
    if width < WIDE or out <= SKETCH:
        return [_correction(weight, half.drift, half.residual) for half in halves]

    def few(matrix: Tensor | None) -> Tensor | None:
        return None if matrix is None else sketch_rows(matrix, SKETCH)

    rows = sketch_rows(weight, SKETCH)
    return [_correction(rows, half.drift, few(half.residual)) for half in halves]


def _correction(weight: Tensor, drift: Tensor | None, residual: Tensor | None) -> Tensor:
    """``W C + R``; R is all of it without C."""
    if drift is None:
        assert residual is not None
        return residual
    return weight @ drift if residual is None else weight @ drift + residual
