"""From texts and chats to the model's forward arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimum_sab.calibration.samples.chat import Sample
from optimum_sab.errors import SampleError

_PICTURE_KEYS = ("image", "url", "path", "base64")
_PLACEHOLDERS = ("<image>", "<|image_pad|>", "<|image|>", "<image_soft_token>", "<IMG_CONTEXT>", "[IMG]")
_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def encode_samples(
    samples: Sequence[Sample], processor: Any, sequence_length: int, answer_follows: bool = False
) -> list[dict[str, Any]]:
    """Turn texts and chats into the model's forward arguments, one sample each.

    Args:
        samples: from `optimum_sab.calibration.samples.reading.read_samples`.
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
