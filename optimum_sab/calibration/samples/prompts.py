"""Prompts that calibrate nothing, for a person to see what a model says before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optimum_sab.calibration.samples.encoding import Encoding, can_be_shown_pictures, encode_sample
from optimum_sab.data.unseen import unseen_chats, unseen_texts
from optimum_sab.errors import SABError, warn

EACH = 3  # prompts of a kind
OPENING = 32  # tokens of a text that are given
_FURTHER = 200  # characters of how it goes on


@dataclass(frozen=True)
class ExamplePrompt:
    """What a model is asked to go on from.

    Attributes:
        kind: "text" or "pictures".
        prompt: in words.
        expected: how the text goes on, or the right answer.
        picture: what is shown with the question, a PIL image; None without.
        inputs: the model's forward arguments.
    """

    kind: str
    prompt: str
    expected: str
    picture: Any
    inputs: dict[str, Any]


def example_prompts(model: Any, processor: Any) -> list[ExamplePrompt]:
    """A few beginnings of texts, and questions about pictures if the model reads any; always the same ones.

    Args:
        model: the model.
        processor: its processor or tokenizer. Pictures that it does not prepare are left out, with a warning.

    Raises:
        SampleError, MissingDependencyError: see `encode_sample`, of a text.
    """
    prompts = [_opening(text, processor) for text in unseen_texts()[:EACH]]
    if can_be_shown_pictures(model.config, processor):
        try:
            prompts += [_question(chat, processor) for chat in unseen_chats()[:EACH]]
        except SABError as error:  # a template may know pictures in a way of its own
            warn(f"the report will not show what the model says about pictures: {error}")
    return prompts


def _opening(text: str, processor: Any) -> ExamplePrompt:
    inputs = encode_sample(text, Encoding(processor, OPENING), "an unseen text")
    tokenizer = getattr(processor, "tokenizer", processor)
    read = str(tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True))
    rest = text[len(read) :] if text.startswith(read) else ""
    return ExamplePrompt("text", read, _cut(rest), None, inputs)


def _question(chat: list[Any], processor: Any) -> ExamplePrompt:
    question, answer = chat[:2]
    inputs = encode_sample([question], Encoding(processor, OPENING, answer_follows=True), "an unseen picture")
    parts = {part["type"]: part for part in question["content"]}
    return ExamplePrompt(
        "pictures", parts["text"]["text"], answer["content"][0]["text"], parts["image"]["image"], inputs
    )


def _cut(text: str) -> str:
    """Whole words."""
    return text if len(text) <= _FURTHER else text[:_FURTHER].rpartition(" ")[0]
