"""A message's content: a text, or parts of text, pictures, videos and sound."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum_sab.calibration.samples.media import SERVED, SOURCES
from optimum_sab.calibration.samples.pictures import load_picture, load_video
from optimum_sab.calibration.samples.sounds import load_sound
from optimum_sab.errors import SampleError, warn
from optimum_sab.wording import did_you_mean


def read_content(content: Any, label: str, folder: Path | None = None) -> str | list[dict[str, Any]]:
    """A text as it is; parts as ``{"type": "text", "text": …}``, ``{"type": "image", "image": …}`` and the like.

    A part of a picture that brings none stays without; whether that is an error shows only when it is encoded.

    Args:
        content: of a message.
        label: names the sample in errors.
        folder: paths are relative to it.

    Raises:
        SampleError: a part's type or one of its keys is not known, or a picture cannot be read.
    """
    if isinstance(content, str):
        return content
    given = content if isinstance(content, (list, tuple)) else [content]
    if not all(isinstance(part, Mapping) for part in given):
        raise _not_understood(content, label)
    return [_read_part({k: v for k, v in part.items() if v is not None}, content, label, folder) for part in given]


def _read_part(part: dict[str, Any], content: Any, label: str, folder: Path | None) -> dict[str, Any]:
    kind = part.pop("type", None)
    if kind is None:  # {"image": …} and {"text": …}, as the pages of Qwen spell them
        named = [key for key in ("text", *SOURCES, *SERVED) if key in part]
        kind = named[0] if len(named) == 1 else None
    if not isinstance(kind, str):
        raise _not_understood(content, label)
    if kind == "text":
        text = part.pop("text", None)
        if not isinstance(text, str):
            raise _not_understood(content, label)
        _refuse_keys(part, kind, label)
        return {"type": "text", "text": text}
    kind = SERVED.get(kind, kind)
    if kind not in SOURCES:
        raise SampleError(
            f"{label} has a part of type {kind!r}, which is not understood; the types are text, "
            f"{', '.join((*SOURCES, *SERVED))}{did_you_mean(kind, ('text', *SOURCES, *SERVED))}"
        )
    found = {key: part.pop(key) for key in SOURCES[kind] if key in part}
    index = None if found else part.pop("index", None)  # which of the pictures beside the messages
    if index is not None and (isinstance(index, bool) or not isinstance(index, int)):
        raise SampleError(f"{label} has a part of type {kind!r} with the index {index!r}, which is no whole number.")
    _refuse_keys(part, kind, label)
    if len(found) > 1:
        raise SampleError(f"{label} has a part of type {kind!r} with {' and '.join(found)}; give one of them.")
    source = _address(next(iter(found.values())), kind, label) if found else None
    if source is None:
        return {"type": kind} if index is None else {"type": kind, "index": index}
    load = {"image": load_picture, "video": load_video, "audio": load_sound}[kind]
    return {"type": kind, kind: load(source, label, folder)}


def _address(source: Any, kind: str, label: str) -> Any:
    """What ``{"url": …, "detail": …}`` refers to; the detail is how closely a server shall look, which none here is."""
    if not isinstance(source, Mapping) or {"bytes", "path", "array"} & set(source):
        return source
    rest = {key: value for key, value in source.items() if key not in ("url", "detail") and value is not None}
    _refuse_keys(rest, kind, label)
    if source.get("detail") not in (None, "auto"):
        warn(
            "calibration samples have pictures with 'detail', by which servers choose a size: it is left out. The "
            "processor's own settings decide (--processor, SABConfig(processor=...))."
        )
    return source.get("url")


def _refuse_keys(rest: Mapping[str, Any], kind: str, label: str) -> None:
    if rest:
        raise SampleError(
            f"{label} has a part of type {kind!r} with {', '.join(map(repr, rest))}, which is not understood; remove it"
            " (what the processor shall do differently, set in the processor and give it as --processor PATH, "
            "SABConfig(processor=...))."
        )


def _not_understood(content: Any, label: str) -> SampleError:
    return SampleError(
        f"{label} has a message with the content {str(content)[:80]!r}; give a text, or a list of parts such as "
        "{'type': 'text', 'text': ...} and {'type': 'image', 'image': ...}."
    )
