"""Pictures and videos that stand beside the messages, put where the messages leave room for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from optimum_sab.errors import SampleError

Message = dict[str, Any]


def fill_in(chat: Sequence[Message], kind: str, media: Sequence[Any], label: str) -> list[Message]:
    """The chat with ``media`` in the place of its placeholders, in order.

    A placeholder is a part ``{"type": kind}`` that brings nothing (with an "index", which of them), or ``<image>`` (or
    ``<video>``) in a text. Where there is none, all come before the text of the first user message, as trainers do.

    Args:
        chat: see `optimum_sab.calibration.samples.chat.read_chat`.
        kind: "image", "video" or "audio".
        media: loaded; at least one.
        label: names the sample in errors.

    Raises:
        SampleError: there are more or fewer of them than placeholders, or the messages bring some themselves.
    """
    opened = [{**message, "content": list(_opened(message["content"], kind))} for message in chat]
    parts = [part for message in opened for part in message["content"] if part["type"] == kind]
    if any(kind in part for part in parts):
        raise SampleError(f"{label} has a column of {kind}s and messages that bring their own; keep one of them.")
    if not parts:
        return _in_front(chat, [{"type": kind, kind: each} for each in media], label)
    indices = [part.pop("index", place) for place, part in enumerate(parts)]
    if set(indices) != set(range(len(media))):
        raise SampleError(
            f"{label} brings {len(media)} {kind}(s) for {len(parts)} placeholder(s) of its messages; make them as many."
        )
    for part, index in zip(parts, indices, strict=True):
        part[kind] = media[index]
    return [
        before if kind not in {part["type"] for part in after["content"]} else after
        for before, after in zip(chat, opened, strict=True)
    ]


def _opened(content: str | Sequence[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    """Parts, with the marks in texts as parts of their own."""
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] != "text":
            yield dict(part)
            continue
        first, *others = re.split(rf"<{kind}>\s*", part["text"])
        if first or not others:
            yield {"type": "text", "text": first}
        for text in others:
            yield {"type": kind}
            if text:
                yield {"type": "text", "text": text}


def _in_front(chat: Sequence[Message], parts: list[dict[str, Any]], label: str) -> list[Message]:
    filled = list(chat)
    for place, message in enumerate(chat):
        if message["role"] == "user":
            content = message["content"]
            own = [{"type": "text", "text": content}] if isinstance(content, str) else content
            first = next((i for i, part in enumerate(own) if part["type"] == "text"), len(own))
            filled[place] = {**message, "content": [*own[:first], *parts, *own[first:]]}
            return filled
    raise SampleError(f"{label} brings pictures or sound and has no message of the user to put them in; add one.")
