"""What a sample is before it is a model's input: a text, a chat, a chat with tools, or forward arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimum_sab.calibration.samples.media import names_media
from optimum_sab.calibration.samples.parts import read_content
from optimum_sab.errors import SampleError, warn
from optimum_sab.wording import did_you_mean

Sample = str | list[dict[str, Any]] | dict[str, Any]
"""A text; a list of messages; ``{"messages": …, "tools": …}``; or arguments of the model's forward."""

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
# of chat templates; which of them a template shows, and whether others, is its own business
_USUAL_ROLES = (
    *("user", "assistant", "system", "developer", "tool", "function", "model", "ipython", "document", "context"),
    *("environment", "observation"),
)


def is_chat(sample: Any) -> bool:
    """Whether this is a list of messages: each with a role and a content (or calls of tools), or from and value."""
    return (
        isinstance(sample, Sequence)
        and not isinstance(sample, (str, bytes))
        and len(sample) > 0
        and all(
            isinstance(m, Mapping)
            and (("role" in m and ("content" in m or "tool_calls" in m)) or ("from" in m and "value" in m))
            for m in sample
        )
    )


def read_chat(chat: Sequence[Mapping[str, Any]], label: str, folder: Path | None = None) -> list[dict[str, Any]]:
    """Messages with "role" and "content", spelled as Transformers' processors read them; copies of the given ones.

    What else a message has goes along to the chat template (`optimum_sab.calibration.samples.template`).

    Args:
        chat: see `is_chat`; messages may be ShareGPT's ``{"from", "value"}``.
        label: names the sample in errors.
        folder: paths of pictures are relative to it.

    Raises:
        SampleError: a role, a content or a part is not understood, or a message has pictures or the like beside them.

    Warns of a role that is none of the usual ones.
    """
    return [_read_message(message, label, folder) for message in chat]


def read_tools(tools: Any, label: str) -> list[Any]:
    """The tools of a chat, as JSON schemas or functions; a string is JSON.

    Raises:
        SampleError: it is something else.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else error
            raise SampleError(f"{label}: 'tools' is a string that is not JSON ({reason}); give a list.") from error
    if not isinstance(tools, (list, tuple)) or not all(isinstance(each, Mapping) or callable(each) for each in tools):
        raise SampleError(f"{label}: 'tools' must be a list of JSON schemas; it is {str(tools)[:80]!r}.")
    return [without_nothing(each) if isinstance(each, Mapping) else each for each in tools]


def check_text(text: str, label: str) -> str:
    """The text, which every tokenizer can encode.

    Raises:
        SampleError: half of a surrogate pair stands alone in it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(
            f"{label} has the lone surrogate {text[error.start]!a} at character {error.start}, which is no text; "
            "remove it."
        ) from error
    return text


def without_nothing(value: Any) -> Any:
    """A copy of nested mappings without the keys whose value is None, with which datasets fill what a row lacks."""
    if isinstance(value, Mapping):
        return {key: without_nothing(each) for key, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [without_nothing(each) for each in value]
    return value


def _read_message(message: Mapping[str, Any], label: str, folder: Path | None) -> dict[str, Any]:
    given = {str(key): value for key, value in message.items() if value is not None}
    if "from" in given and "role" not in given:
        if "content" in given:
            raise SampleError(f"{label} has a message with 'from', 'value' and 'content'; remove 'value' or 'content'.")
        speaker = given.pop("from")
        given = {
            "role": _ROLES.get(speaker) if isinstance(speaker, str) else None,
            "content": given.pop("value", None),
            **given,
        }
        if given["role"] is None:
            hint = did_you_mean(str(speaker), _ROLES)
            raise SampleError(f"{label} has a message from {speaker!r}; use one of {', '.join(_ROLES)}{hint}")
    role, content = given.pop("role", None), given.pop("content", None)
    if not isinstance(role, str):
        raise SampleError(f"{label} has a message with the role {role!r}; give 'user', 'assistant' or the like.")
    _warn_of_role(role)
    for key in given:
        if names_media(key):
            raise SampleError(
                f"{label} has a message with the entry {key!r}, which is not understood; put it into the content, as "
                "{'type': 'image', 'image': ...}, or beside the messages."
            )
    if content is None and not given.get("tool_calls"):
        raise SampleError(
            f"{label} has a message with the content 'None'; give a text, or a list of parts such as "
            "{'type': 'text', 'text': ...} (only a message with tool_calls may have none)."
        )
    others = without_nothing(given)
    for text in _texts(others):
        check_text(text, label)
    content = "" if content is None else read_content(content, label, folder)
    for text in [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]:
        check_text(text, label)
    return {"role": check_text(role, label), "content": content, **others}


def _warn_of_role(role: str) -> None:
    """In the same words for every sample, so that it is told once for a set of them."""
    if role in _USUAL_ROLES or role in _ROLES:
        return
    hint = did_you_mean(role.lower(), _USUAL_ROLES, f"; the usual ones are {', '.join(_USUAL_ROLES)}.")
    warn(
        f"calibration samples have messages with the role {role!r}, which is none of the usual ones and goes to the "
        f"model's chat template as it is{hint}"
    )


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for each in pair for text in _texts(each)]
    if isinstance(value, (list, tuple)):
        return [text for each in value for text in _texts(each)]
    return []
