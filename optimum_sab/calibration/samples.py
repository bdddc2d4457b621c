"""Calibration samples: every accepted form is read into texts and chats, and those into model inputs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimum_sab.data.builtin import builtin_samples
from optimum_sab.errors import MissingDependencyError, SampleError

BUILTIN = "builtin"
SELF = "self"
Sample = str | list[dict[str, Any]]
_DATASET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_PICTURE_KEYS = ("image", "url", "path", "base64")
_PLACEHOLDERS = ("<image>", "<|image_pad|>", "<|image|>", "<image_soft_token>", "<IMG_CONTEXT>", "[IMG]")


def read_samples(source: Any, count: int, seed: int, visual: bool) -> list[Sample]:
    """Read calibration data in any accepted form.

    Args:
        source: None or ``"builtin"`` for the built-in set (``"self"`` is not read but written by the model, see
            `optimum_sab.calibration.self_samples`); the path of a ``.jsonl`` file; a Hub dataset as
            ``"owner/name"`` or ``"owner/name:split"`` (needs the ``datasets`` package); a text; a chat (a list of
            messages with "role" and "content"); or a list of texts and chats.
        count: how many samples to take at most.
        seed: seed of the built-in set, and of the order in which a dataset is drawn.
        visual: whether the model reads pictures (the built-in set shows it some).

    Raises:
        SampleError: the source is empty, unreadable, or of an unknown form; names the sample.
    """
    if source is None or source == BUILTIN:
        return list(builtin_samples(count, seed, visual))
    if source == SELF:
        raise SampleError(
            f"calibration={SELF!r} has samples only once a model wrote them; call self_samples, or give SABConfig this "
            "value and from_pretrained does."
        )
    if isinstance(source, (str, Path)) and str(source).endswith((".jsonl", ".json")):
        samples = _read_jsonl(Path(source))
    elif isinstance(source, str) and _DATASET.fullmatch(source):
        samples = _read_dataset(source, count, seed)
    elif isinstance(source, str):
        samples = [source]
    elif _is_chat(source):
        samples = [list(source)]
    elif isinstance(source, Sequence):
        samples = [_checked(sample, f"calibration sample {i}") for i, sample in enumerate(source)]
    else:
        raise SampleError(
            f"calibration={type(source).__name__} is not understood; give texts, chats, a .jsonl path, a dataset name, "
            f"{BUILTIN!r}, or {SELF!r}."
        )
    if not samples:
        raise SampleError("there are no calibration samples; give at least one, or calibration='builtin'.")
    return samples[:count]


def encode_samples(
    samples: Sequence[Sample], processor: Any, sequence_length: int, answer_follows: bool = False
) -> list[dict[str, Any]]:
    """Turn texts and chats into the model's forward arguments, one sample each.

    Args:
        samples: from `read_samples`.
        processor: a Transformers processor, or a tokenizer for a language model.
        sequence_length: texts are cut to this many tokens; a chat with pictures is kept whole, because cutting it
            would cut the picture.
        answer_follows: chats end with a question and the model is to go on from there.

    Raises:
        SampleError: a text refers to a picture that the sample does not bring, a picture cannot be read, or the
            processor has no chat template.
    """
    return [
        _encode(sample, processor, sequence_length, f"calibration sample {i}", answer_follows)
        for i, sample in enumerate(samples)
    ]


def has_chat_template(processor: Any) -> bool:
    """Whether a processor or tokenizer can prepare chats."""
    return any(getattr(each, "chat_template", None) for each in (processor, getattr(processor, "tokenizer", None)))


def _encode(sample: Sample, processor: Any, sequence_length: int, label: str, answer_follows: bool) -> dict[str, Any]:
    tokenizer = getattr(processor, "tokenizer", processor)
    if isinstance(sample, str):
        _refuse_placeholder(sample, processor, label)
        inputs = dict(tokenizer(sample, return_tensors="pt", truncation=True, max_length=sequence_length))
    else:
        template_owner = processor if getattr(processor, "chat_template", None) else tokenizer
        if getattr(template_owner, "chat_template", None) is None:
            raise SampleError(f"{label} is a chat and the processor has no chat template; give plain texts instead.")
        chat = [{**message, "content": _parts(message["content"], label)} for message in sample]
        pictures = _check_pictures(chat, processor, label)
        if template_owner is tokenizer and any(part["type"] != "text" for m in chat for part in m["content"]):
            raise SampleError(f"{label} holds more than text and the model's processor takes text only; remove it.")
        messages = _text_only(chat) if template_owner is tokenizer else chat
        try:
            inputs = dict(
                template_owner.apply_chat_template(
                    messages,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    add_generation_prompt=answer_follows,
                )
            )
        except ImportError:
            raise  # names the package to install
        except Exception as error:  # a template or a picture can fail in any way, and it is this sample's doing
            raise SampleError(f"{label} cannot be prepared by the model's processor: {error}") from error
        if pictures and set(inputs) <= set(_PER_TOKEN):
            raise SampleError(f"{label} holds a picture and the model's processor passed it over; remove the sample.")
        if not pictures:
            inputs = {k: v[:, :sequence_length] if k in _PER_TOKEN else v for k, v in inputs.items()}
    if inputs["input_ids"].shape[-1] == 0:
        raise SampleError(f"{label} has no tokens; remove it.")
    return inputs


_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def _is_chat(sample: Any) -> bool:
    return (
        isinstance(sample, Sequence)
        and not isinstance(sample, str)
        and len(sample) > 0
        and all(isinstance(m, Mapping) and "role" in m and "content" in m for m in sample)
    )


def _checked(sample: Any, label: str) -> Sample:
    if isinstance(sample, str):
        return sample
    if isinstance(sample, Mapping) and _is_chat(sample.get("messages")):
        sample = sample["messages"]
    if not _is_chat(sample):
        raise SampleError(
            f"{label} is a {type(sample).__name__}; give a text, or a list of messages with 'role' and 'content'."
        )
    return list(sample)


def _check_pictures(chat: list[dict[str, Any]], processor: Any, label: str) -> int:
    """Number of pictures in a chat; every picture entry must bring its picture and no text may stand in for one."""
    pictures = 0
    for message in chat:
        for part in message["content"]:
            kind = part["type"]
            if kind == "text":
                _refuse_placeholder(part["text"], processor, label)
            elif kind in ("image", "video"):
                if all(part.get(key) is None for key in (*_PICTURE_KEYS, kind)):
                    raise SampleError(
                        f"{label} has a part of type {kind!r} without one; give {{'type': {kind!r}, {kind!r}: ...}}."
                    )
                if kind == "video" and getattr(processor, "video_processor", None) is None:
                    raise SampleError(f"{label} holds a video and the model's processor reads none; give pictures.")
                pictures += 1
    return pictures


def _parts(content: Any, label: str) -> list[dict[str, Any]]:
    """A message's content as a list of parts, spelled as the processors of both Transformers lines read it."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts = []
    for given in content if isinstance(content, (list, tuple)) else [content]:
        part = {k: v for k, v in given.items() if v is not None} if isinstance(given, Mapping) else {}
        if not isinstance(part.get("type"), str) or (part["type"] == "text" and not isinstance(part.get("text"), str)):
            raise SampleError(
                f"{label} has a message with the content {str(content)[:80]!r}; give a text, or a list of parts such "
                "as {'type': 'text', 'text': ...} and {'type': 'image', 'image': ...}."
            )
        if part["type"] == "image_url":  # OpenAI's; Transformers 4.57 would pass it over in silence
            url = part.get("image_url")
            part = {"type": "image", "url": url.get("url") if isinstance(url, Mapping) else url}
        parts.append(part)
    return parts


def _refuse_placeholder(text: str, processor: Any, label: str) -> None:
    own = getattr(processor, "image_token", None)
    reads_pictures = getattr(processor, "image_processor", None) is not None
    for placeholder in (own, *(_PLACEHOLDERS if reads_pictures else ())):
        if isinstance(placeholder, str) and placeholder in text:
            raise SampleError(
                f"{label} refers to a picture ({placeholder!r}) that it does not bring; give a chat message with "
                "{'type': 'image', 'image': ...}, or remove the placeholder."
            )


def _text_only(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Message contents as plain strings, which tokenizers' templates expect."""
    return [{**m, "content": "".join(part["text"] for part in m["content"])} for m in chat]


def _read_jsonl(path: Path) -> list[Sample]:
    """One JSON object a line: ``{"text": …}``, ``{"messages": […]}``, or ``{"text": …, "image": path}``.

    Picture paths are relative to the file.
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
        if not _is_chat(chat):
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


def _read_dataset(source: str, count: int, seed: int) -> list[Sample]:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"calibration={source!r} names a Hub dataset and the datasets package is missing: pip install datasets."
        ) from error
    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        taken = list(rows.shuffle(seed=seed, buffer_size=1000).take(count))
    except (OSError, ValueError) as error:
        raise SampleError(f"calibration={source!r} cannot be read as a Hub dataset: {error}") from error
    return [_read_row(row, f"{name} row {i}") for i, row in enumerate(taken)]


def _read_row(row: Mapping[str, Any], label: str) -> Sample:
    """A dataset row: 'messages', or 'text'/'question' with 'image'(s) where there are any."""
    if _is_chat(row.get("messages")):
        return list(row["messages"])
    text = next((row[k] for k in ("text", "question", "caption", "prompt") if isinstance(row.get(k), str)), None)
    images = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
    if text is None:
        raise SampleError(f"{label} has columns {', '.join(row)}; one of 'messages', 'text', 'question' is needed.")
    if not images:
        return str(text)
    return [
        {"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]}
    ]
