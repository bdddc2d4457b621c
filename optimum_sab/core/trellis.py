"""The best stored bits of many rows at once: a trellis search whose survivors carry their own error feedback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from optimum_sab.core.code import Code

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
    from torch import Tensor

STRIDE = 32  # columns that are settled at a time, when as many more have been searched
AT_ONCE = 128  # a row of at most so many columns is searched before any are settled
LOST = 1e30
CHOICE_BYTES = 2**28  # bound on the choices held at once in torch


@dataclass(frozen=True)
class Levels:
    """What the columns of a search can take: ``c[j] (a[0] (P_1[j] + P_2[j] / 2) + Σ_f ± a[f])``.

    Attributes:
        row_scale: a [coded plane, then free planes, blocks, out].
        column_scale: c [in].
        block: which block's row scales a column has, [in].
        free: how many free planes a column has, [in]: the first ones.
    """

    row_scale: Float[Tensor, "planes blocks out"]
    column_scale: Float[Tensor, " in"]
    block: Int[Tensor, " in"]
    free: Int[Tensor, " in"]

    def columns(self, start: int, end: int) -> Levels:
        """Of some columns."""
        part = slice(start, end)
        return Levels(self.row_scale, self.column_scale[part], self.block[part], self.free[part])

    def rows(self, part: slice) -> Levels:
        """Of some rows."""
        return Levels(self.row_scale[:, :, part], self.column_scale, self.block, self.free)


@dataclass(frozen=True)
class Ends:
    """What is fixed around the columns of a search.

    Attributes:
        before: stored bits of the ``memory`` columns before, [out, memory]; 0 where the row begins.
        after: stored bits of the last columns of the search itself, [out, tail].
    """

    before: Bool[Tensor, "out memory"]
    after: Bool[Tensor, "out tail"]

    def rows(self, part: slice) -> Ends:
        """Of some rows."""
        return Ends(self.before[part], self.after[part])


class Search(Protocol):
    """`search_bits`, or what gives the same but for rounding."""

    def __call__(
        self,
        target: Float[Tensor, "out in"],
        inverse_factor: Float[Tensor, "in in"],
        levels: Levels,
        code: Code,
        ends: Ends | None = None,
    ) -> UInt8[Tensor, "out in"]: ...


def whole_rows(rows: int, memory: int, device: torch.device) -> Ends:
    """Nothing before, nothing fixed."""
    nothing = torch.zeros(rows, memory, dtype=torch.bool, device=device)
    return Ends(nothing, nothing[:, :0])


def first_state(ends: Ends) -> Int[Tensor, " out"]:
    """The state before the first column: the last bit before it is the lowest."""
    state = torch.zeros(ends.before.shape[0], dtype=torch.int64, device=ends.before.device)
    for k in range(ends.before.shape[1]):
        state |= ends.before[:, -1 - k].long() << k
    return state


def step_signs(code: Code) -> Float[Tensor, "planes 2 states"]:
    """±1 of the derived planes at a step into a state, by the bit that leaves the register."""
    registers = torch.arange(2 * code.states)
    found = torch.zeros(len(code.taps), 2 * code.states)
    for q, shifts in enumerate(code.shifts):
        found[q] = torch.stack([registers >> k & 1 for k in shifts]).sum(0) % 2 * 2.0 - 1.0
    return found.view(len(code.taps), 2, code.states)


def search_bits(
    target: Float[Tensor, "out in"],
    inverse_factor: Float[Tensor, "in in"],
    levels: Levels,
    code: Code,
    ends: Ends | None = None,
) -> UInt8[Tensor, "out in"]:
    """Bits that make ``(t − q) H (t − q)ᵀ`` of every row small, with one survivor per state of the code.

    A survivor that takes the value v at column j has the error ``e = (t_j − Σ_{i<j} e_i U_ij − v) / U_jj``, and pays
    ``e²``; with free planes it takes the nearest of their levels. Beyond `AT_ONCE` columns the oldest `STRIDE` are
    settled by the best survivor, and those that differ from it there are dropped, so the errors held have a bound.

    Args:
        target: T.
        inverse_factor: upper triangular U with ``Uᵀ U = H⁻¹``.
        levels: what can be chosen.
        code: how the derived planes are made.
        ends: what is fixed; None for whole rows.

    Returns:
        Bit 0 is the stored bit u, bit 1 + f the sign of free plane f.
    """
    ends = ends or whole_rows(target.shape[0], code.memory, target.device)
    at_once = max(1, CHOICE_BYTES // (target.shape[1] * code.states))
    parts = [slice(first, first + at_once) for first in range(0, target.shape[0], at_once)]
    return torch.cat(
        [_Paths(target[part], inverse_factor, levels.rows(part), code, ends.rows(part)).found() for part in parts]
    )


class _Paths:
    """Survivors of some rows."""

    def __init__(self, target: Tensor, inverse_factor: Tensor, levels: Levels, code: Code, ends: Ends) -> None:
        rows, width = target.shape
        self._rest, self._factor, self._levels, self._ends = target.clone(), inverse_factor, levels, ends
        self._block, self._free = levels.block.tolist(), levels.free.tolist()
        self._states, device = code.states, target.device
        state = torch.arange(self._states, device=device)
        self._state = state
        self._from = torch.stack([state >> 1, (state >> 1) + self._states // 2])  # by choice
        parts = torch.tensor(code.parts).view(-1, 1, 1)
        self._derived = (step_signs(code) * parts).sum(0).to(device)  # [choice, states]
        self._cost = torch.full((rows, self._states), LOST, device=device)
        self._cost.scatter_(1, first_state(ends)[:, None] & (self._states - 1), 0.0)
        self._errors = torch.empty(rows, 0, self._states, device=device)  # of the columns that are not settled
        # bit 0 the choice, bit 1 + f the sign of free plane f
        self._choice = torch.zeros(width, rows, self._states, dtype=torch.uint8, device=device)

    def found(self) -> Tensor:
        width = self._rest.shape[1]
        most = width if width <= AT_ONCE else 2 * STRIDE
        for j in range(width):
            if self._errors.shape[1] == most:
                self._settle(j)
            self._step(j)
        bits = torch.empty(width, self._rest.shape[0], dtype=torch.uint8, device=self._rest.device)
        state = self._cost.argmin(1)
        for j in range(width - 1, -1, -1):
            choice = self._choice[j].gather(1, state[:, None])[:, 0]
            bits[j] = (choice & 0xFE) | (state & 1)
            state = self._before(choice, state)
        return bits.T.contiguous()

    def _before(self, choice: Tensor, state: Tensor) -> Tensor:
        return (state >> 1) + (choice & 1).long() * (self._states // 2)

    def _step(self, j: int) -> None:
        held = self._errors.shape[1]
        coupling = self._factor[j - held : j, j]
        rest = self._rest[:, j : j + 1] - torch.einsum("rks,k->rs", self._errors, coupling)
        scale = self._levels.column_scale[j] * self._levels.row_scale[:, self._block[j]]
        miss = rest[:, self._from] - scale[0][:, None, None] * self._derived  # [rows, choice, states]
        signs = torch.zeros(miss.shape, dtype=torch.uint8, device=miss.device)
        for f, plane in self._largest_first(scale[1 : 1 + self._free[j]]):
            up = (miss >= 0) == (plane >= 0)
            miss -= torch.where(up, plane, -plane)
            signs |= up.to(torch.uint8) << (1 + f)
        miss /= self._factor[j, j]
        total = self._cost[:, self._from] + miss.square()
        second = total[:, 1] < total[:, 0]
        self._cost = torch.where(second, total[:, 1], total[:, 0])
        tail = self._ends.after.shape[1]
        if j >= self._rest.shape[1] - tail:
            bit = self._ends.after[:, j - (self._rest.shape[1] - tail)]
            self._cost.masked_fill_((self._state & 1).bool() != bit[:, None], LOST)
        source = torch.where(second, self._from[1], self._from[0])
        kept = self._errors.gather(2, source[:, None].expand(-1, held, -1))
        own = torch.where(second, miss[:, 1], miss[:, 0])
        self._errors = torch.cat([kept, own[:, None]], 1)
        self._choice[j] = torch.where(second, signs[:, 1], signs[:, 0]) | second.to(torch.uint8)

    def _largest_first(self, scale: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Free planes: which, and its scale, [rows, 1, 1]; each row has its own order."""
        order = scale.abs().argsort(dim=0, descending=True, stable=True)
        return [(f[:, None, None], scale.gather(0, f[None])[0][:, None, None]) for f in order]

    def _settle(self, j: int) -> None:
        """Fix the oldest columns as the best survivor has them, before column ``j``."""
        held, rows = self._errors.shape[1], self._cost.shape[0]
        state = self._state.expand(rows, -1)
        for column in range(j - 1, j - 1 - (held - STRIDE), -1):
            state = self._before(self._choice[column].gather(1, state), state)
        best = self._cost.argmin(1, keepdim=True)
        agrees = state == state.gather(1, best)
        self._cost = torch.where(agrees, self._cost - self._cost.gather(1, best), LOST)
        chosen = best[:, None].expand(-1, STRIDE, -1)
        errors = self._errors[:, :STRIDE].gather(2, chosen)[..., 0]
        self._rest[:, j:] -= errors @ self._factor[j - held : j - held + STRIDE, j:]
        self._errors = self._errors[:, STRIDE:]
