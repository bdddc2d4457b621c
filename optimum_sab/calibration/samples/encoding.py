"""From samples to the model's forward arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optimum_sab.calibration.samples.chat import Sample
from optimum_sab.calibration.samples.forward_inputs import PER_TOKEN, token_count
from optimum_sab.calibration.samples.rows import read_row
from optimum_sab.calibration.samples.sounds import sound_for
from optimum_sab.calibration.samples.template import TemplateWatch
from optimum_sab.errors import MissingDependencyError, SampleError, warn, warnings_heard
from optimum_sab.nn.modalities import VISUAL, model_modalities

_PLACEHOLDERS = ("<image>", "<|image_pad|>", "<|image|>", "<image_soft_token>", "<IMG_CONTEXT>", "[IMG]")
_READERS = {
    "image": ("image_processor",),
    "video": ("video_processor",),
    "audio": ("feature_extractor", "audio_processor"),
}


@dataclass(frozen=True)
class Encoding:
    """How the samples of one set are encoded.

    Args:
        processor: a Transformers processor, or a tokenizer for a language model.
        sequence_length: texts are cut to this many tokens, and so is what was prepared without pictures; a chat with
            pictures is kept whole, because cutting it would cut the picture.
        answer_follows: chats end with a question and the model is to go on from there.

    Attributes:
        watch: of what the template shows; to be asked for its warnings when all samples are encoded.
    """

    processor: Any
    sequence_length: int
    answer_follows: bool = False
    watch: TemplateWatch = field(default_factory=TemplateWatch, compare=False)


def encode_samples(
    samples: Sequence[Sample], processor: Any, sequence_length: int, answer_follows: bool = False
) -> list[dict[str, Any]]:
    """Turn samples into the model's forward arguments, one sample each.

    Args:
        samples: from `optimum_sab.calibration.samples.reading.read_samples`.
        processor: see `Encoding`, as are the others.

    Raises:
        SampleError: a text refers to a picture that the sample does not bring, a picture cannot be read, or the
            processor has no chat template.
        MissingDependencyError: a package is missing that the processor needs.
    """
    encoding = Encoding(processor, sequence_length, answer_follows)
    with warnings_heard():  # each is told once
        encoded = [encode_sample(sample, encoding, f"calibration sample {i}") for i, sample in enumerate(samples)]
        encoding.watch.warn()
    return encoded


def takes_pictures(processor: Any) -> bool:
    """Whether a processor prepares chats with pictures, by a chat template of its own; a tokenizer's knows none."""
    return getattr(processor, "tokenizer", processor) is not processor and bool(
        getattr(processor, "chat_template", None)
    )


def can_be_shown_pictures(config: Any, processor: Any) -> bool:
    """Whether the package can show a model pictures of its own; where it reads some and cannot, that is warned of.

    Args:
        config: of the model. One that reads no pictures is shown none without a word.
        processor: its processor or tokenizer.
    """
    if VISUAL in model_modalities(config):
        if takes_pictures(processor):
            return True
        kind = type(processor).__name__
        tokenizer = getattr(processor, "tokenizer", processor)
        why = f"{kind} is a tokenizer alone" if tokenizer is processor else f"{kind} has no chat template"
        remedy = "give a processor with a chat template for pictures (SABConfig(processor=...), --processor)"
    elif getattr(config, "vision_config", None) is not None:
        kind = getattr(config, "model_type", type(config).__name__)
        why = f"the configuration of {kind} names no token in the place of a picture"
        remedy = "give calibration samples with pictures as arguments of its forward, and compare it on some yourself"
    else:
        return False
    warn(
        f"the model reads pictures, and is shown texts alone in the comparison with the dense model, in the report's "
        f"examples and in samples of the package's or its own making (built-in, self): {why}; {remedy}."
    )
    return False


def encode_sample(sample: Any, encoding: Encoding, label: str) -> dict[str, Any]:
    """One sample's forward arguments; ``label`` names it in errors. See `encode_samples`."""
    sample, _ = read_row(sample, label)
    if isinstance(sample, str):
        inputs = _encode_text(sample, encoding, label)
    elif isinstance(sample, list):
        inputs = _encode_chat(sample, [], encoding, label)
    elif "messages" in sample:
        inputs = _encode_chat(sample["messages"], sample["tools"], encoding, label)
    else:
        inputs = sample
    if set(inputs) <= set(PER_TOKEN):
        inputs = {name: value[:, : encoding.sequence_length] for name, value in inputs.items()}
    if token_count(inputs) == 0:
        raise SampleError(f"{label} has no tokens; remove it.")
    return inputs


def _encode_text(text: str, encoding: Encoding, label: str) -> dict[str, Any]:
    processor = encoding.processor
    tokenizer = getattr(processor, "tokenizer", processor)
    _refuse_placeholder(text, processor, label)
    return dict(tokenizer(text, return_tensors="pt", truncation=True, max_length=encoding.sequence_length))


def _encode_chat(
    messages: Sequence[Mapping[str, Any]], tools: list[Any], encoding: Encoding, label: str
) -> dict[str, Any]:
    processor = encoding.processor
    tokenizer = getattr(processor, "tokenizer", processor)
    template_owner = processor if getattr(processor, "chat_template", None) else tokenizer
    if getattr(template_owner, "chat_template", None) is None:
        raise SampleError(
            f"{label} is a chat and the processor has no chat template; give plain texts, or what the processor has "
            "made of texts and pictures."
        )
    chat = [{**message, "content": _parts(message["content"])} for message in messages]
    kinds = {part["type"] for message in chat for part in message["content"]} - {"text"}
    _check_parts(chat, processor, label)
    if kinds and template_owner is tokenizer:
        raise SampleError(
            f"{label} holds more than text and the model's processor takes text only; remove it, or give the processor "
            "that prepares pictures for the model."
        )
    if "audio" in kinds:
        chat = [{**message, "content": _heard(message["content"], processor, label)} for message in chat]
    chat = _text_only(chat) if template_owner is tokenizer else chat
    encoding.watch.look(template_owner, chat, tools)
    try:
        inputs = dict(
            template_owner.apply_chat_template(
                chat,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=encoding.answer_follows,
                **({"tools": tools} if tools else {}),
            )
        )
    except ImportError as error:  # names the package to install
        raise MissingDependencyError(f"{label} cannot be prepared without a package: {error}") from error
    except Exception as error:  # a template or a picture can fail in any way, and it is this sample's doing
        raise SampleError(f"{label} cannot be prepared by the model's processor: {error}") from error
    if kinds and set(inputs) <= set(PER_TOKEN):
        raise SampleError(f"{label} holds a picture and the model's processor passed it over; remove the sample.")
    return inputs


def _check_parts(chat: Sequence[Mapping[str, Any]], processor: Any, label: str) -> None:
    """Every part that is no text must bring something that the processor reads, and no text may stand in for one."""
    for message in chat:
        for part in message["content"]:
            kind = part["type"]
            if kind == "text":
                _refuse_placeholder(part["text"], processor, label)
            elif kind not in part:
                raise SampleError(
                    f"{label} has a part of type {kind!r} without one; give {{'type': {kind!r}, {kind!r}: ...}}."
                )
            elif kind != "image" and getattr(processor, "tokenizer", None) and not _reads(processor, kind):
                raise SampleError(
                    f"{label} holds a part of type {kind!r} and the model's processor reads none; remove it."
                )


def _reads(processor: Any, kind: str) -> bool:
    return any(getattr(processor, name, None) is not None for name in _READERS[kind])


def _heard(parts: Sequence[Mapping[str, Any]], processor: Any, label: str) -> list[dict[str, Any]]:
    """Parts with sounds as the processor takes them."""
    rates = (getattr(getattr(processor, name, None), "sampling_rate", None) for name in _READERS["audio"])
    rate = next((rate for rate in rates if rate is not None), None)
    return [{**part, **({"audio": sound_for(part["audio"], rate, label)} if "audio" in part else {})} for part in parts]


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Contents as the processors of both Transformers lines read them: as parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _refuse_placeholder(text: str, processor: Any, label: str) -> None:
    own = getattr(processor, "image_token", None)
    for placeholder in (own, *(_PLACEHOLDERS if _reads(processor, "image") else ())):
        if isinstance(placeholder, str) and placeholder in text:
            raise SampleError(
                f"{label} refers to a picture ({placeholder!r}) that it does not bring; give a chat message with "
                "{'type': 'image', 'image': ...}, or remove the placeholder."
            )


def _text_only(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Message contents as plain strings, which tokenizers' templates expect."""
    return [{**m, "content": "".join(part["text"] for part in m["content"])} for m in chat]
