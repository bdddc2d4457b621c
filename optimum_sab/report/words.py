"""Numbers as a person reads them."""

from __future__ import annotations

import re

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def bytes_in_words(count: float) -> str:
    """With three digits, in powers of 1000."""
    size, unit = float(count), 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.0f} {_UNITS[unit]}" if not unit or size >= 99.5 else f"{size:.3g} {_UNITS[unit]}"


def seconds_in_words(seconds: float) -> str:
    """In the unit that leaves few digits."""
    if seconds < 99.5:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits; a dash where there is none."""
    if value is None:
        return "–"
    return f"{float(value):.{digits}g}" if abs(value) >= 1e-3 or not value else f"{float(value):.1e}"


def percent(share: float | None) -> str:
    """Of 1; a dash where there is none."""
    return "–" if share is None else f"{100 * float(share):.3g} %"


def said(text: str) -> str:
    """What a model wrote, without the empty lines that it may write many of."""
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip()
