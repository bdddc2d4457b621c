"""What pictures, videos and sounds are called: in parts of a message, as columns, and where they are not understood."""

from __future__ import annotations

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

_CALLED = ("image", "img", "picture", "photo", "video", "clip", "frame", "audio", "sound")
_WITH = ("{}", "{}s", "{}_url", "{}_urls", "{}_path", "{}_paths", "{}_file", "{}_files", "input_{}", "{}_base64")
_OTHERS = ("media", "multimedia", "attachment", "attachments", "documents")
_NAMES = frozenset((*_OTHERS, *(form.format(each) for each in _CALLED for form in _WITH)))


def names_media(name: str) -> bool:
    """Whether an entry of this name holds pictures, sound or documents, so that the sample is another one without."""
    return name.lower() in _NAMES
