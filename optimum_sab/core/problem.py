"""What planes are fitted to: the least-squares problem of one weight, or of a stack of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """``min tr((T − Q) H (T − Q)ᵀ)`` over weights Q that planes stand for; where there are dots, of each of a stack.

    Attributes:
        target: T, fp32 [..., out, in].
        hessian: damped H, fp32 [..., in, in].
        inverse_factor: upper triangular U with ``Uᵀ U = H⁻¹``, fp32 [..., in, in].
        dead: columns whose input was always zero, bool [..., in].
        error_weight: Λ² of the alternating fit, fp32 [..., in]; 0 at dead columns.
        pull: ``T H`` [..., out, in]; None without a refit.
    """

    target: Float[Tensor, "... out in"]
    hessian: Float[Tensor, "... in in"]
    inverse_factor: Float[Tensor, "... in in"]
    dead: Bool[Tensor, "... in"]
    error_weight: Float[Tensor, "... in"]
    pull: Float[Tensor, "... out in"] | None

    def empty_stack(self, count: int) -> Problem:
        """Memory for a stack of so many problems like this one; see `put`."""
        return self._each(lambda tensor: tensor.new_empty(count, *tensor.shape))

    def put(self, index: int, problem: Problem) -> None:
        """Copy a problem into its place in this stack."""
        for name, given in vars(problem).items():
            if given is not None:
                getattr(self, name)[index] = given

    def first(self, count: int) -> Problem:
        """Some of a stack; views."""
        return self._each(lambda tensor: tensor[:count])

    def of(self, index: int) -> Problem:
        """One of a stack; views."""
        return self._each(lambda tensor: tensor[index])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Problem:
        return Problem(
            change(self.target),
            change(self.hessian),
            change(self.inverse_factor),
            change(self.dead),
            change(self.error_weight),
            None if self.pull is None else change(self.pull),
        )
