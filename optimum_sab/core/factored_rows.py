"""A damped Hessian of few rows, factored through their Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.hessian import RAISED, accumulate_hessian, cholesky_or_none, singular
from optimum_sab.core.planes import block_bounds
from optimum_sab.errors import NonFiniteError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


@dataclass(frozen=True)
class FactoredRows:
    """``H = X̂ᵀ X̂ + λ I``, factored.

    Attributes:
        rows: X̂ [rows, in].
        ridge: λ.
        gram_factor: lower triangular L with ``L Lᵀ = X̂ X̂ᵀ + λ I``, [rows, rows], fp64.
        inverse_factor: upper triangular U with ``Uᵀ U = H⁻¹``, [in, in].
        dead: columns whose input was always zero, bool [in].
    """

    rows: Float[Tensor, "rows in"]
    ridge: float
    gram_factor: Float[Tensor, "rows rows"]
    inverse_factor: Float[Tensor, "in in"]
    dead: Bool[Tensor, " in"]

    @cached_property
    def hessian(self) -> Float[Tensor, "in in"]:
        """The damped H, made when it is first asked for."""
        H = self.rows.new_zeros(self.rows.shape[1], self.rows.shape[1])
        accumulate_hessian(H, self.rows)
        H.diagonal().add_(self.ridge)
        return H

    @property
    def diagonal(self) -> Float[Tensor, " in"]:
        """Of H."""
        return self.rows.square().sum(0) + self.ridge

    def local(self, start: int, end: int) -> Float[Tensor, "width width"]:
        """The damped H of some columns."""
        X = self.rows[:, start:end]
        H = X.T @ X
        H.diagonal().add_(self.ridge)
        return H


def gram_factor(rows: Float[Tensor, "rows in"], ridge: float) -> Float[Tensor, "rows rows"] | None:
    """L of `FactoredRows`; None where there is none."""
    X = rows.double()
    gram = X @ X.T
    gram.diagonal().add_(ridge)
    return cholesky_or_none(gram)


def factor_rows(
    rows: Float[Tensor, "rows in"], damping: float, block_size: int, name: str = "the layer"
) -> FactoredRows:
    """What `factor_hessian` finds of ``X̂ᵀ X̂``, but for rounding.

    Block k of U comes from ``H_kk`` less what later columns tell of it, ``λ (I + X_kᵀ G⁻¹ X_k)`` with
    ``G = λ I + Σ X_j X_jᵀ`` over the later blocks j: nothing is taken off anything, so little is lost where λ is small.

    Args:
        rows: X̂, fp32.
        damping: as in `factor_hessian`.
        block_size: columns factored at a time.
        name: the layer's, for messages.

    Raises:
        NonFiniteError: the rows hold NaN or inf.
        SingularHessianError: no Cholesky factor at a hundred times the damping.
    """
    width = rows.shape[1]
    mean = float(rows.square().sum(dtype=torch.float64)) / width
    if not mean < float("inf"):
        raise NonFiniteError(f"the inputs of {name} hold NaN or inf; they overflow, try dtype=torch.float32.")
    for raised in RAISED:
        ridge = mean * damping * raised
        whole = gram_factor(rows, ridge) if ridge else None
        U = None if whole is None else _inverse_factor(rows, ridge, block_size)
        if whole is not None and U is not None:
            return FactoredRows(rows, ridge, whole, U, (rows == 0).all(0))
    raise singular(damping, name)


def _inverse_factor(rows: Tensor, ridge: float, block_size: int) -> Tensor | None:
    count, width = rows.shape
    U = rows.new_zeros(width, width)
    gram = torch.eye(count, dtype=torch.float64, device=rows.device) * ridge
    for start, end in reversed(block_bounds(width, block_size)):
        X = rows[:, start:end]
        factor = cholesky_or_none(gram)
        if factor is None:
            return None
        known = torch.linalg.solve_triangular(factor.float(), X, upper=False)  # L⁻¹ X_k
        left = known.T @ known
        left.diagonal().add_(1.0)
        lower = cholesky_or_none(left.flip(0, 1))  # of columns in the other order
        if lower is None:
            return None
        upper = lower.flip(0, 1) * ridge**0.5  # R Rᵀ = λ (I + X_kᵀ G⁻¹ X_k), R upper triangular
        identity = torch.eye(end - start, device=rows.device)
        corner = torch.linalg.solve_triangular(upper, identity, upper=True)
        U[start:end, start:end] = corner
        if end < width:
            back = torch.linalg.solve_triangular(factor.float().T, known, upper=True)  # G⁻¹ X_k
            torch.mm((corner @ back.T).neg_(), rows[:, end:], out=U[start:end, end:])
        gram += (X @ X.T).double()
    return U
