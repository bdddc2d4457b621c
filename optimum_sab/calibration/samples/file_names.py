"""A text that is nothing but the name of a file was meant as the file: a model would be calibrated on the name."""

from __future__ import annotations

import json
import os

from optimum_sab.data.named_source import OTHER_SUFFIXES, SUFFIXES, opened
from optimum_sab.errors import SampleError

_MEDIA = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jfif"),
    "video": (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv"),
    "audio": (".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".wma", ".aiff"),
}
_KINDS = {suffix: kind for kind, suffixes in _MEDIA.items() for suffix in suffixes}
_CALLED = {"image": "a picture", "video": "a video", "audio": "a sound"}
_PACKED = (".gz", ".zst", ".zip", ".bz2", ".xz", ".tar", ".arrow")  # of the other ones, those that hold no plain text
_LONGEST = 1024  # characters; a longer one is no name


def check_no_file(text: str, label: str) -> str:
    """The text, which is more than the name of a picture, a video, a sound or a data file.

    A name is one line that ends in a known suffix, with no space in it unless it leads to a file.

    Raises:
        SampleError: it is such a name; says how the file is given.
    """
    name = text.strip()
    suffix = _suffix(name)
    if suffix is None or len(name.splitlines()) > 1 or not (len(name.split()) == 1 or _is_file(name)):
        return text
    kind = _KINDS.get(suffix)
    said = f"{label} is {name!r}, which names {'a file' if kind is None else _CALLED[kind]} and would be calibrated on"
    if kind is not None:
        row = json.dumps({kind: name, "question": "...", "answer": "..."}, ensure_ascii=False)
        raise SampleError(f"{said} as a text; give a row such as {row}.")
    if suffix in SUFFIXES:
        raise SampleError(f"{said} as a text; give calibration={name!r}, or the rows of several files in one list.")
    if suffix in _PACKED:
        raise SampleError(f"{said} as a text; unpack it, and give the rows it holds, or a {SUFFIXES[0]} file of them.")
    raise SampleError(f"{said} as a text; give what stands in it, such as calibration={opened(name, suffix)}.")


def _suffix(name: str) -> str | None:
    """The suffix, in small letters, of a name that has a known one."""
    if len(name) > _LONGEST:
        return None
    path = name.partition("?")[0] if "://" in name else name
    stem, suffix = os.path.splitext(path)
    known = suffix.lower() in _KINDS or suffix.lower() in (*SUFFIXES, *OTHER_SUFFIXES)
    return suffix.lower() if stem and known else None


def _is_file(name: str) -> bool:
    try:
        return os.path.isfile(os.path.expanduser(name))
    except ValueError:  # a null character
        return False
