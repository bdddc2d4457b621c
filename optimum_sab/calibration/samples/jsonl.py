"""Calibration files: one JSON value a line, or a list of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optimum_sab.calibration.samples.chat import is_chat
from optimum_sab.errors import SampleError


def jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Every line's value, with a label such as "data.jsonl line 3"; lines with nothing in them are skipped.

    Raises:
        SampleError: the file cannot be read, or a line is not JSON; names it.
    """
    number = 0
    try:
        # newline: splitting at every line separator of Unicode would also split inside of JSON strings
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    label = f"{path.name} line {number}"
                    yield label, _parsed(line, label)
    except UnicodeDecodeError as error:
        raise SampleError(
            f"the calibration file {str(path)!r} is not UTF-8 behind line {number} ({error.reason}); save it as UTF-8."
        ) from error
    except OSError as error:
        raise SampleError(f"the calibration file {str(path)!r} cannot be read: {error}") from error


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of a file that holds one list, with labels such as "data.json entry 3"; else what `jsonl_rows` gives.

    Raises:
        SampleError: see `jsonl_rows`.
    """
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError):  # lines, or something that the lines will tell
        whole = None
    if not isinstance(whole, list):
        yield from jsonl_rows(path)
        return
    for number, value in enumerate([whole] if is_chat(whole) else whole):
        yield f"{path.name} entry {number}", value


def _parsed(line: str, label: str) -> Any:
    try:
        return json.loads(line.rstrip("\r\n"))  # else what is cut off is missed on the next line
    except RecursionError as error:
        raise SampleError(f"{label} is nested too deeply to be read.") from error
    except json.JSONDecodeError as error:  # its own line is the first and only one of what was read
        raise SampleError(f"{label} is not JSON: {error.msg} at column {error.colno}.") from error
    except ValueError as error:  # also numbers of more digits than Python converts
        raise SampleError(f"{label} is not JSON: {error}") from error
