"""Values as JSON has them: it has no word for NaN and infinity, though Python's writer makes them up."""

from __future__ import annotations

import json
import math
from typing import Any


def finite(value: Any) -> Any:
    """The same with None in the place of what is no finite number, down to the last entry of what it holds."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_line(value: Any) -> str:
    """What any JSON reader reads, in one line."""
    return json.dumps(finite(value), allow_nan=False)
