"""What came of a family."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optimum_sab.errors import SABError

WORKS, REFUSED, FAILED, NOT_BUILT = "works", "refused", "failed", "not built"
OUTCOMES = (WORKS, REFUSED, FAILED, NOT_BUILT)


@dataclass(frozen=True)
class Outcome:
    """One row of the result.

    Attributes:
        family: model type.
        outcome: "works"; "refused" where a named error came before any weight was read; "failed"; "not built" where the
            dense random model itself could not be made here.
        stage: where it ended; empty where it works.
        reason: first line of the error; empty where it works.
        pictures: how many samples held a picture.
        sound: how many samples held sound.
        share: part of the language model's matrices that is binarized, experts counted; None before that is known.
        seconds: of one processor core, without the imports.
        left_out: what was not asked because the dense model cannot do it either.
        warnings: what the library said about it.
    """

    family: str
    outcome: str
    stage: str = ""
    reason: str = ""
    pictures: int = 0
    sound: int = 0
    share: float | None = None
    seconds: float = 0.0
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For a file or another program."""
        return asdict(self)


def totals(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many families there are of each outcome."""
    found = [each.outcome for each in outcomes]
    return {name: found.count(name) for name in OUTCOMES}


def first_line(error: BaseException) -> str:
    """An error's class and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class FamiliesFailedError(SABError, RuntimeError):
    """At least one family failed."""


def check_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Nothing may fail: what cannot be binarized is to be refused beforehand.

    Raises:
        FamiliesFailedError: something did, by name.
    """
    failed = [each.family for each in outcomes if each.outcome == FAILED]
    if failed:
        raise FamiliesFailedError(f"{len(failed)} of {len(outcomes)} families failed: {', '.join(failed)}.")
