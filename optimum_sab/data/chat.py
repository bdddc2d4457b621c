"""Chats in the message format of Transformers' processors, made of questions and their answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    prompt: str
    answer: str


def chat_messages(turns: Iterable[Turn], image: object | None = None) -> list[Message]:
    """The turns as messages of user and assistant; the picture, if there is one, stands before the first prompt."""
    messages: list[Message] = []
    for turn in turns:
        content: list[Message] = [{"type": "text", "text": turn.prompt}]
        if image is not None and not messages:
            content.insert(0, {"type": "image", "image": image})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return messages
