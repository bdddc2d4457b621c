"""Calibration files: one JSON object a line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from optimum_sab.calibration.samples.chat import Sample, is_chat
from optimum_sab.errors import MissingDependencyError, SampleError


def read_jsonl(path: Path) -> list[Sample]:
    """One JSON object a line: ``{"text": …}``, ``{"messages": […]}``, or ``{"text": …, "image": path}``.

    Picture paths are relative to the file.

    Raises:
        SampleError: the file, a line or a picture cannot be read; names it.
        MissingDependencyError: there are pictures, and Pillow is missing.
    """
    if not path.is_file():
        raise SampleError(f"the calibration file {str(path)!r} does not exist.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(f"the calibration file {str(path)!r} is not UTF-8: {error}") from error
    samples: list[Sample] = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also split inside JSON strings
        if not line.strip():
            continue
        label = f"{path.name} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise SampleError(f"{label} is not JSON: {error}") from error
        samples.append(_read_record(record, path.parent, label))
    return samples


def _read_record(record: Any, folder: Path, label: str) -> Sample:
    if isinstance(record, str):
        return record
    if isinstance(record, dict) and "messages" in record:
        chat = record["messages"]
        if not is_chat(chat):
            raise SampleError(f"{label}: 'messages' must be a list of messages with 'role' and 'content'.")
        for message in chat:
            for part in message["content"] if isinstance(message["content"], list) else []:
                if not isinstance(part, dict) or part.get("type") != "image":
                    continue
                for key in ("image", "path"):
                    if isinstance(part.get(key), str):
                        part["image"] = _open_picture(part.pop(key), folder, label)
        return list(chat)
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        names = record.get("images") or [n for n in [record.get("image")] if n is not None]
        if not names:
            return str(record["text"])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise SampleError(f"{label}: 'image' must be a path, and 'images' a list of paths.")
        pictures = [{"type": "image", "image": _open_picture(name, folder, label)} for name in names]
        text = re.sub(r"<image>\s*", "", record["text"])
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]
    raise SampleError(f"{label} needs a 'text' or a 'messages' entry.")


def _open_picture(name: str, folder: Path, label: str) -> Any:
    if re.match(r"https?://|data:", name):
        return name  # the processor fetches it
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependencyError("pictures need Pillow: pip install 'optimum-sab[quantize]'.") from error
    path = Path(name) if Path(name).is_absolute() else folder / name
    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError as error:
        raise SampleError(f"{label}: the picture {str(path)!r} does not exist.") from error
    except (UnidentifiedImageError, OSError) as error:
        raise SampleError(f"{label}: the picture {str(path)!r} cannot be read: {error}") from error
