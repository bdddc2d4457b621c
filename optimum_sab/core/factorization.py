"""The damped factorizations of a Hessian that the solver needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optimum_sab.errors import NonFiniteError, SingularHessianError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# Inputs from which sums, factors and Gram matrices are found in another order where that is much less work and memory.
# What is narrower costs little, and stays what it has always been, bit for bit.
WIDE = 1024
RAISED = (1.0, 10.0, 100.0)  # times the damping, until there is a factor
CORNER = 256  # columns of a triangle that are inverted at once
STRIP = 512  # columns of a product with a triangle


def damped(hessian: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """``H + damping · mean(diag H) · I`` (method.md section 1)."""
    result = hessian.clone()
    result.diagonal().add_(damping * hessian.diagonal().mean())
    return result


@dataclass(frozen=True)
class FactoredHessian:
    """A damped Hessian with the factor the error feedback needs.

    Attributes:
        hessian: the damped ``H`` [in, in].
        inverse_factor: upper triangular ``U`` with ``Uᵀ U = H⁻¹``.
        dead: columns whose input was always zero, bool [in].
        added: what the damping has added to the diagonal.
        kept_inverse: ``H⁻¹`` [in, in] where U was found from it; None from `WIDE` inputs on.
    """

    hessian: Float[Tensor, "in in"]
    inverse_factor: Float[Tensor, "in in"]
    dead: Tensor
    added: float
    kept_inverse: Float[Tensor, "in in"] | None = None

    @property
    def inverse_diagonal(self) -> Float[Tensor, " in"]:
        """The diagonal of ``H⁻¹``."""
        return self.inverse_factor.square().sum(0) if self.kept_inverse is None else self.kept_inverse.diagonal()

    def times_inverse(self, left: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """``B H⁻¹``; by way of ``B Uᵀ U``, of which no zeros are multiplied, where ``H⁻¹`` is not kept."""
        if self.kept_inverse is not None:
            return left @ self.kept_inverse
        U, between = self.inverse_factor, torch.empty_like(left)
        for start in range(0, len(U), STRIP):
            torch.mm(left[:, start:], U[start : start + STRIP, start:].T, out=between[:, start : start + STRIP])
        return times_upper(between, U)


def quadratic_form(matrix: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]) -> float:
    """``tr(M H Mᵀ)``; from `WIDE` columns on by the upper half of H alone."""
    width = len(hessian)
    if width < WIDE:
        return float(((matrix @ hessian) * matrix).sum())
    total = torch.zeros((), dtype=torch.float64, device=hessian.device)  # read once: a device is waited for then
    for start in range(0, width, STRIP):
        end = min(start + STRIP, width)
        mine = matrix[:, start:end]
        total += ((mine @ hessian[start:end, start:end]) * mine).sum()
        if end < width:
            total += 2.0 * ((mine @ hessian[start:end, end:]) * matrix[:, end:]).sum().double()
    return float(total)


def factor_hessian(hessian: Float[Tensor, "in in"], damping: float, name: str = "the layer") -> FactoredHessian:
    """Damp and factor a Hessian; the damping is raised tenfold, up to twice, while no factor exists.

    From `WIDE` inputs on U is the inverse of the upper triangular R with ``H = R Rᵀ``, and ``H⁻¹`` is never made.

    Raises:
        NonFiniteError: the Hessian holds NaN or inf.
        SingularHessianError: no Cholesky factor at a hundred times the damping.
    """
    _check_finite(hessian, name)
    dead = hessian.diagonal() == 0
    for raised in RAISED:
        H, added = damped(hessian, damping * raised), damping * raised * float(hessian.diagonal().mean())
        if len(H) >= WIDE:
            root = H.clone()
            if upper_root(root):
                return FactoredHessian(H, invert_upper(root.triu_()), dead, added)
            continue
        factor = _cholesky(H)
        if factor is None:
            continue
        inverse = torch.cholesky_inverse(factor)
        del factor  # they are large
        upper = _cholesky(inverse, upper=True)
        if upper is not None:
            return FactoredHessian(H, upper, dead, added, inverse)
    raise _singular(damping, name)


def upper_root(H: Float[Tensor, "n n"]) -> bool:
    """Put R into the upper half of H, upper triangular with ``R Rᵀ = H``: by halves, so that nearly all is products.

    With ``H = [[A, B], [Bᵀ, D]]`` and ``D = S Sᵀ`` it is ``[[root of A − C Cᵀ, C], [0, S]]`` with ``C = B S⁻ᵀ``.

    Args:
        H: symmetric; read and written in its upper half alone, and of no use where there is no root.

    Returns:
        Whether there is one.
    """
    size = len(H)
    if size <= CORNER:
        lower, failed = torch.linalg.cholesky_ex(H.triu().flip(0, 1))  # of which it reads the lower half
        if int(failed):
            return False
        H.copy_(lower.flip(0, 1))
        return True
    half = size // 2
    A, B, D = H[:half, :half], H[:half, half:], H[half:, half:]
    if not upper_root(D):
        return False
    B.copy_(torch.linalg.solve_triangular(D.mT, B, upper=False, left=False))
    for start in range(0, half, STRIP):
        A[start : start + STRIP, start:].addmm_(B[start : start + STRIP], B[start:].T, alpha=-1.0)
    return upper_root(A)


def invert_upper(R: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """``R⁻¹`` of an upper triangular R, in its place: by halves, so that nearly all of it is products.

    ``[[A, B], [0, D]]⁻¹ = [[A⁻¹, −A⁻¹ B D⁻¹], [0, D⁻¹]]``.
    """
    size = len(R)
    if size <= CORNER:
        identity = torch.eye(size, dtype=R.dtype, device=R.device)
        return R.copy_(torch.linalg.solve_triangular(R, identity, upper=True))
    half = size // 2
    A, B, D = R[:half, :half], R[:half, half:], R[half:, half:]
    invert_upper(A)
    invert_upper(D)
    right = times_upper(B, D)
    for start in range(0, half, STRIP):  # A⁻¹ is upper triangular too
        torch.mm(A[start : start + STRIP, start:], right[start:], out=B[start : start + STRIP])
    B.neg_()
    return R


def times_upper(left: Float[Tensor, "m n"], U: Float[Tensor, "n n"]) -> Float[Tensor, "m n"]:
    """``B U`` of an upper triangular U, of which no zeros are multiplied."""
    found = torch.empty_like(left, memory_format=torch.contiguous_format)
    for start in range(0, len(U), STRIP):
        end = start + STRIP
        torch.mm(left[:, :end], U[:end, start:end], out=found[:, start:end])
    return found


def solve_damped(
    right: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], damping: float, name: str = "the layer"
) -> Float[Tensor, "out in"]:
    """``B H⁻¹`` with H damped as in `factor_hessian`, which raises the same errors; needs less memory than H⁻¹."""
    _check_finite(hessian, name)
    for raised in RAISED:
        H = damped(hessian, damping * raised)
        if len(H) >= WIDE:
            if upper_root(H):
                half = torch.linalg.solve_triangular(H.mT, right, upper=False, left=False)
                return torch.linalg.solve_triangular(H, half, upper=True, left=False)
            continue
        factor = _cholesky(H)
        if factor is not None:
            return torch.cholesky_solve(right.T, factor).T
    raise _singular(damping, name)


def _check_finite(hessian: Tensor, name: str) -> None:
    if not bool(torch.isfinite(hessian.sum())) and not bool(torch.isfinite(hessian).all()):
        raise NonFiniteError(f"the Hessian of {name} holds NaN or inf; its inputs overflow, try dtype=torch.float32.")


def _cholesky(matrix: Tensor, upper: bool = False) -> Tensor | None:
    """The Cholesky factor; None where there is none."""
    factor, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
    return None if int(failed) else factor


def _singular(damping: float, name: str) -> SingularHessianError:
    return SingularHessianError(
        f"the Hessian of {name} is still singular with damping={100 * damping:g}; give more calibration samples or "
        "raise damping."
    )
