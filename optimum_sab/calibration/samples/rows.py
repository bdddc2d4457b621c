"""A row in the forms that trainers, datasets and JSONL files use, read into a sample: the one place that knows them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum_sab.calibration.samples.chat import Sample, check_text, is_chat, read_chat, read_tools
from optimum_sab.calibration.samples.file_names import check_no_file
from optimum_sab.calibration.samples.forward_inputs import IDS, read_inputs
from optimum_sab.calibration.samples.media import COLUMNS, names_media, renaming
from optimum_sab.calibration.samples.pictures import load_picture, load_video
from optimum_sab.calibration.samples.placeholders import fill_in
from optimum_sab.calibration.samples.sounds import load_sound
from optimum_sab.core.bounds import shown
from optimum_sab.errors import SampleError
from optimum_sab.wording import nearest

CHATS = ("messages", "conversations", "conversation")
ANSWERED = {"prompt": "completion", "question": "answer", "instruction": "output"}  # and what an answer is called
PROMPTS = ("text", *ANSWERED, "caption")  # a question or a beginning, or all of it
ANSWERS = (*ANSWERED.values(), "response")  # to any of them
KNOWN_COLUMNS = (*CHATS, *PROMPTS, *ANSWERS, *COLUMNS, "input", "system", "tools")
_LIKE_ANSWERS = (  # not read: what is right of several, or a class, is not known
    *("answers", "completions", "responses", "outputs", "target", "targets", "label", "labels", "reply", "solution"),
    *("ground_truth", "gt_answer", "reference", "references", "multiple_choice_answer", "direct_answers"),
)
_MEDIA = {"image": load_picture, "video": load_video, "audio": load_sound}
_UNREAD = ("functions", "function_call")  # would change what the model sees, as media do
FORMS = (
    "'messages', 'text', 'question' (with 'answer') or 'prompt' (with 'completion'), where 'image' or 'images' may "
    "stand beside them, or 'input_ids'"
)


def read_row(row: Any, label: str, folder: Path | None = None) -> tuple[Sample, list[str]]:
    """A sample, and the columns of the row that are no part of it.

    Reading what was read changes nothing.

    Args:
        row: a text; a list of messages; or a mapping with one of: "messages" or "conversations"; "text", "caption",
            "prompt", "question", "instruction" (with "input"), each with its "answer", "completion", "output" or
            "response"; "input_ids" or "decoder_input_ids" with other arguments of the model's forward. Beside messages
            and texts may stand "image", "images", "video", "videos", "audio", "audios", "system" and "tools". What is
            None counts as absent.
        label: names the row in errors.
        folder: paths of pictures are relative to it.

    Raises:
        SampleError: the row is of no such form, or nested without end; or it has a question, and its answer seems to
            be in a column that is not read.
    """
    try:
        return _read(row, label, folder)
    except RecursionError as error:
        raise SampleError(f"{label} is nested too deeply to be read, or holds itself.") from error


def _read(row: Any, label: str, folder: Path | None) -> tuple[Sample, list[str]]:
    if isinstance(row, str):
        return check_no_file(check_text(row, label), label), []
    if isinstance(row, os.PathLike):
        check_no_file(os.fsdecode(row), label)
    if is_chat(row):
        return read_chat(row, label, folder), []
    if not isinstance(row, Mapping):
        raise SampleError(
            f"{label} is a {type(row).__name__}; give a text, a list of messages with 'role' and 'content', or a row "
            f"with {FORMS}."
        )
    columns = {str(key): value for key, value in row.items() if value is not None}
    if any(name in columns for name in IDS):
        return read_inputs(columns, label)
    sample = _read_columns(columns, label, folder)
    if sample is None:
        near = next(filter(None, (nearest(name, (*CHATS, *PROMPTS, *IDS)) for name in columns)), None)
        hint = "one of" if near is None else f"did you mean {near!r}? One of"
        raise SampleError(f"{label} has columns {', '.join(map(str, row)) or 'none'}; {hint} {FORMS} is needed.")
    for name in columns:
        if name in _UNREAD or names_media(name):
            raise SampleError(
                f"{label} has a column {name!r}, which is not understood; {renaming(name, row)}remove it, or the "
                f"row. Pictures, videos and sound are read from {', '.join(COLUMNS)}."
            )
    missing = missing_answer(row)
    answer = None if missing is None else next((name for name in columns if _like_an_answer(name)), None)
    if missing is not None and answer is not None:
        raise SampleError(
            f"{label} has {missing[0]!r} and no {missing[1]!r}, and a column {answer!r}, which is not read. If it "
            f"holds the answer, as a text, call it {missing[1]!r}; if not, remove it: the model is then calibrated on "
            "what is asked alone."
        )
    return sample, list(columns)


def _read_columns(columns: dict[str, Any], label: str, folder: Path | None) -> Sample | None:
    """The sample, if there is one; what it is made of is taken out of the columns."""
    media = {kind: _take_media(columns, kind, label, folder) for kind in _MEDIA}
    system, tools = columns.pop("system", None), columns.pop("tools", None)
    found = _take_chat(columns, label, folder)
    found = found or _take_text(columns, label, needs_chat=bool(system or tools or any(media.values())))
    if found is None or isinstance(found, str):
        return found
    chat = found
    for kind, given in media.items():
        if given:
            chat = fill_in(chat, kind, given, label)
    if system:
        chat = _under_system(chat, system, label)
    return {"messages": chat, "tools": read_tools(tools, label)} if tools else chat


def missing_answer(row: Any) -> tuple[str, str] | None:
    """The question, or beginning, of a row that has no answer, and what its answer would be called; None of others."""
    if not isinstance(row, Mapping) or is_chat(row.get("prompt")):
        return None
    given = {str(key) for key, value in row.items() if value is not None}
    name = None if given & {*CHATS, *IDS} else next((name for name in PROMPTS if name in given), None)
    return None if name not in ANSWERED or given & set(ANSWERS) else (name, ANSWERED[name])


def _like_an_answer(name: str) -> bool:
    misspelt = nearest(name, ANSWERS)
    return name.lower() in _LIKE_ANSWERS or (misspelt is not None and abs(len(misspelt) - len(name)) <= 1)


def _told(value: Any) -> str:
    """A value of the wrong type, in a message."""
    return f"the {type(value).__name__} {shown(value)}"


def _take_media(columns: dict[str, Any], kind: str, label: str, folder: Path | None) -> list[Any]:
    one, many = columns.pop(kind, None), columns.pop(f"{kind}s", None)
    if one is not None and many is not None:
        raise SampleError(f"{label} has the columns {kind!r} and '{kind}s'; keep one of them.")
    if many is not None and not isinstance(many, (list, tuple)):
        raise SampleError(f"{label}: '{kind}s' must be a list, and is {_told(many)}; name the column {kind!r} for one.")
    if many is None:
        many = [] if one is None else one if kind == "image" and isinstance(one, (list, tuple)) else [one]
    return [_MEDIA[kind](each, label, folder) for each in many]


def _take_chat(columns: dict[str, Any], label: str, folder: Path | None) -> str | list[dict[str, Any]] | None:
    for name in CHATS:
        if name in columns:
            chat = columns.pop(name)
            if not is_chat(chat):
                raise SampleError(
                    f"{label}: {name!r} must be a list of messages with 'role' and 'content', and is {_told(chat)}."
                )
            return read_chat(chat, label, folder)
    if is_chat(columns.get("prompt")):
        chat = list(columns.pop("prompt"))
        if is_chat(columns.get("completion")):
            chat += columns.pop("completion")
        return read_chat(chat, label, folder)
    return None


def _take_text(columns: dict[str, Any], label: str, needs_chat: bool) -> str | list[dict[str, Any]] | None:
    """A text, or as a chat where only that can hold what belongs to it."""
    name = next((name for name in PROMPTS if name in columns), None)
    if name is None:
        return None
    text = columns.pop(name)
    if not isinstance(text, str):
        raise SampleError(f"{label}: {name!r} must be a text, and is {_told(text)}.")
    check_text(text, label)
    if name == "instruction" and isinstance(columns.get("input"), str):
        text = "\n".join(filter(None, (text, check_text(columns.pop("input"), label))))
    answer = _take_answer(columns, ANSWERED[name], label) if name in ANSWERED else None
    if answer is not None and name == "prompt" and not needs_chat:
        return text + check_text(answer, label)  # a text in two pieces
    if answer is None and not needs_chat:
        return check_no_file(text, label)
    turns = [{"role": "user", "content": text}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": check_text(answer, label)}]


def _take_answer(columns: dict[str, Any], usual: str, label: str) -> str | None:
    given = [usual] if usual in columns else [name for name in ANSWERS if name in columns]
    if len(given) > 1:
        raise SampleError(f"{label} has the columns {' and '.join(map(repr, given))}; keep the one with the answer.")
    if not given:
        return None
    answer = columns.pop(given[0])
    if not isinstance(answer, str):
        raise SampleError(f"{label}: {given[0]!r} must be a text, and is {_told(answer)}.")
    return answer


def _under_system(chat: list[dict[str, Any]], system: Any, label: str) -> list[dict[str, Any]]:
    if not isinstance(system, str):
        raise SampleError(f"{label}: 'system' must be a text, and is {_told(system)}.")
    if chat[0]["role"] == "system":
        raise SampleError(f"{label} has a column 'system' and messages that begin with their own; keep one of them.")
    return [{"role": "system", "content": check_text(system, label)}, *chat]
