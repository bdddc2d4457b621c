"""Linear trellis codes: two planes that are made of one stored plane, by xor of shifts along a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimum_sab.errors import ConfigError
from optimum_sab.wording import did_you_mean

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor

NO_CODE = "none"
MOST_MEMORY = 6
LEAST_STATES = 8  # a code of fewer is searched with as many survivors


@dataclass(frozen=True)
class Code:
    """Planes of a stored plane u: ``P_q[j] = xor of u[j − k] over the bits k of taps[q]``, u being 0 before the row.

    Each derived plane has half the scale of the one before it: a coded plane stands for ``a (P_1 + P_2 / 2)``, whose
    levels are −3, −1, 1 and 3 times ``a / 2``. Ungerboeck's codes (1982) in feedforward form have his parity checks as
    taps, h⁰ first.

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

    @property
    def parts(self) -> tuple[float, ...]:
        """Scales of the derived planes, of the coded plane's: 1, 1/2, …"""
        return tuple(0.5**q for q in range(len(self.taps)))

    @property
    def shifts(self) -> tuple[tuple[int, ...], ...]:
        """Of every derived plane, how far back the bits are that it is the xor of."""
        return tuple(tuple(k for k in range(tap.bit_length()) if tap >> k & 1) for tap in self.taps)

    def computed(self, stored: int) -> int:
        """Planes that a product is made of, where ``stored`` ones are stored, the coded one among them."""
        return stored + len(self.taps) - 1

    def planes(self, stored: Bool[Tensor, "out in"]) -> list[Bool[Tensor, "out in"]]:
        """The derived planes, True being +1."""
        width = stored.shape[1]
        found = []
        for shifts in self.shifts:
            plane = stored.new_zeros(stored.shape)
            for k in shifts:
                if k < width:
                    plane[:, k:] ^= stored[:, : width - k]
            found.append(plane)
        return found


TRELLIS16 = Code("trellis16", (0b10011, 0b00100))
"""16 states, for a coded plane alone: ``P_1 = u ⊕ u₋₁ ⊕ u₋₄``, ``P_2 = u₋₂``."""

TRELLIS16X2 = Code("trellis16x2", (0b11001, 0b10111))
"""16 states, for a coded plane beside free ones: ``P_1 = u ⊕ u₋₃ ⊕ u₋₄``, ``P_2 = u ⊕ u₋₁ ⊕ u₋₂ ⊕ u₋₄``."""

CODES = {code.name: code for code in (TRELLIS16, TRELLIS16X2)}
"""What a checkpoint may be stored with; what a name means never changes."""


def find_code(name: object) -> Code | None:
    """The code of a setting; None for "none".

    Raises:
        ConfigError: there is none of that name.
    """
    if name == NO_CODE:
        return None
    if not isinstance(name, str) or name not in CODES:
        known = (NO_CODE, *CODES)
        raise ConfigError(f"code={name!r} must be one of {', '.join(known)}{did_you_mean(str(name), known)}")
    return CODES[name]


def code_for(base_planes: int) -> Code:
    """The code that loses least where there are so many base planes, the coded one among them."""
    return TRELLIS16 if base_planes == 1 else TRELLIS16X2
