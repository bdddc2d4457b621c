"""What pictures, videos and sounds are called: in parts of a message, as columns, and where they are not understood."""

from __future__ import annotations

from collections.abc import Container

SOURCES = {
    "image": ("image", "url", "path", "base64", "image_url"),
    "video": ("video", "url", "path", "video_url"),
    "audio": ("audio", "url", "path", "audio_url"),
}
"""Kinds of parts, and the keys that may hold what is shown."""

SERVED = {"image_url": "image", "video_url": "video", "audio_url": "audio"}
"""What servers call the parts."""

COLUMNS = tuple(name for kind in SOURCES for name in (kind, f"{kind}s"))
"""Beside messages and texts, where one or several are read from."""

_CALLED = {
    **dict.fromkeys(("image", "img", "picture", "photo", "frame"), "image"),
    **dict.fromkeys(("video", "clip"), "video"),
    **dict.fromkeys(("audio", "sound"), "audio"),
}
_ONE = ("{}", "{}_url", "{}_path", "{}_file", "input_{}", "{}_base64")
_SEVERAL = ("{}s", "{}_urls", "{}_paths", "{}_files")
_OTHERS = ("media", "multimedia", "attachment", "attachments", "documents")
_CONTENT = {"image": ("picture", "pictures"), "video": ("video", "videos"), "audio": ("sound", "sounds")}
_MEANT = {
    form.format(name): (f"the {_CONTENT[kind][forms is _SEVERAL]}", f"{kind}s" if forms is _SEVERAL else kind)
    for name, kind in _CALLED.items()
    for forms in (_ONE, _SEVERAL)
    for form in forms
}


def names_media(name: str) -> bool:
    """Whether an entry of this name holds pictures, sound or documents, so that the sample is another one without."""
    return name.lower() in _MEANT or name.lower() in _OTHERS


def renaming(name: str, given: Container[str]) -> str:
    """The beginning of a remedy for a column that is not understood: what to call it, if it is what it seems to be.

    Args:
        name: of the column.
        given: the columns of the row; of those that are there, none is named.
    """
    content, column = _MEANT.get(name.lower(), ("", ""))
    return f"if it holds {content}, call it {column!r}; if not, " if column and column not in given else ""
