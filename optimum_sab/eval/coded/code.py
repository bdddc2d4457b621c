"""A linear trellis code: planes that are made of one stored plane by xor of shifts along a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optimum_sab.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

MOST_MEMORY = 6
LEAST_STATES = 8  # a code of fewer is searched with as many survivors


@dataclass(frozen=True)
class Code:
    """Planes of a stored plane u: ``P_q[j] = xor of u[j − k] over the bits k of taps[q]``, u being 0 before the row.

    The first plane has the largest scale. With ``W ≈ c (a_1 P_1 + a_2 P_2)``, ``a_2 = a_1 / 2`` the levels are −3, −1,
    1 and 3 times a_2; Ungerboeck's codes (1982) in feedforward form have his parity checks as taps, h⁰ first.

    Attributes:
        name: of it.
        taps: generators of the derived planes.
    """

    name: str
    taps: tuple[int, ...]

    @property
    def memory(self) -> int:
        """How many earlier bits a weight depends on."""
        return max(tap.bit_length() for tap in self.taps) - 1

    @property
    def states(self) -> int:
        """Survivors of the search."""
        return max(LEAST_STATES, 1 << self.memory)

    def planes(self, stored: Bool[Tensor, "out in"]) -> list[Float[Tensor, "out in"]]:
        """The derived planes, ±1 fp32, True being +1."""
        width = stored.shape[1]
        found = []
        for tap in self.taps:
            plane = torch.zeros_like(stored)
            for k in range(tap.bit_length()):
                if tap >> k & 1 and k < width:
                    plane[:, k:] ^= stored[:, : width - k]
            found.append(plane.float() * 2.0 - 1.0)
        return found

    def step_signs(self) -> Float[Tensor, "planes 2 states"]:
        """±1 of the derived planes at a step into a state, by the bit that leaves the register."""
        registers = torch.arange(2 * self.states)
        found = torch.zeros(len(self.taps), 2 * self.states)
        for q, tap in enumerate(self.taps):
            bits = [registers >> k & 1 for k in range(tap.bit_length()) if tap >> k & 1]
            found[q] = torch.stack(bits).sum(0) % 2 * 2.0 - 1.0
        return found.view(len(self.taps), 2, self.states)


CODES = {
    code.name: code
    for code in (
        Code("4", (0b101, 0b010)),
        Code("8", (0b1011, 0b0100)),
        Code("16", (0b10011, 0b00100)),
        Code("32", (0b100101, 0b001000)),
        Code("64", (0b1000011, 0b0010100)),
    )
}


def find_code(name: str) -> Code:
    """The code of a name, which is its number of states; or of generators, as in ``taps:19:4``.

    Raises:
        ConfigError: there is none.
    """
    if name in CODES:
        return CODES[name]
    kind, *taps = name.split(":")
    if kind != "taps" or not 1 <= len(taps) <= 3 or not all(tap.isdigit() for tap in taps):
        raise ConfigError(
            f"code {name!r} is unknown; use one of {', '.join(CODES)}, or generators as in 'taps:19:4' (at most three)."
        )
    code = Code(name, tuple(int(tap) for tap in taps))
    if min(code.taps) < 1 or code.memory > MOST_MEMORY:
        raise ConfigError(f"code {name!r}: generators must be 1 to {2 ** (MOST_MEMORY + 1) - 1}.")
    return code
