"""Numbers as settings: what each may be, told with the value before any work."""

from __future__ import annotations

import math

from optimum_sab.errors import ConfigError

_SHOWN = 60  # characters


def check_integer(name: str, value: object, low: int, high: int, remark: str = "") -> None:
    """Refuse what is no integer within bounds.

    Args:
        name: of the setting.
        value: as it was given.
        low, high: the least and the most that it may be.
        remark: behind the sentence, what a value means or what to take instead.

    Raises:
        ConfigError: it is none; names the value and the bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name}={shown(value)} must be an integer from {low} to {high}{remark}.")


def check_number(name: str, value: object) -> None:
    """Refuse what is no finite number.

    Raises:
        ConfigError: it is none; names the value.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise ConfigError(f"{name}={shown(value)} must be a finite number.")


def shown(value: object) -> str:
    """A value for a message, whatever it is: Python writes no integer of more than 4,300 digits."""
    try:
        text = repr(value)
    except ValueError:
        return f"(an integer of {value.bit_length()} bits)" if isinstance(value, int) else f"({type(value).__name__})"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False
