"""Calibration samples that the dense model writes itself, before it is binarized.

Only how a sample begins is given: the first words of a sentence, or a question about a built-in picture or document.
The rest is the model's own, so the samples are of the kind it was trained to write, in its own chat format.

What is calibrated on is the very tokens that were drawn, with the pictures as they were prepared. Decoding and encoding
again could cut words into other tokens than the model chose and lose the end tokens, and a text that happens to spell a
placeholder would be refused. Only an answer that a further question follows goes through text, because nobody but the
chat template knows how turns are joined.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from optimum_sab.calibration.progress import OnStep, no_step
from optimum_sab.calibration.samples.chat import Sample
from optimum_sab.calibration.samples.continuation import (
    REMEDY,
    Continuation,
    Prompt,
    continue_prompts,
    require_generation,
)
from optimum_sab.calibration.samples.encoding import can_be_shown_pictures, encode_samples
from optimum_sab.calibration.samples.modality import token_modalities
from optimum_sab.calibration.samples.token_inputs import cut_inputs, extend_inputs
from optimum_sab.calibration.samples.vocabulary import Vocabulary, read_vocabulary
from optimum_sab.data.builtin import builtin_samples
from optimum_sab.errors import SampleError
from optimum_sab.nn.modalities import TEXT

OPENING = (3, 8)  # tokens of a text that are given
_SENTENCE_START = re.compile(r"^|(?<=[.!?] )|(?<=[。！？\n])(?=\S)")
_SENTENCE = 200  # characters, more than any opening needs
_UNCUT = 1 << 20


def self_samples(
    model: Any, processor: Any, count: int, sequence_length: int, seed: int = 0, on_step: OnStep = no_step
) -> list[dict[str, Any]]:
    """Have the model write calibration samples, in the rotation of the built-in set.

    Texts go on from the first words of a sentence of the built-in texts. Chats ask what the built-in chats ask, one
    question after the other while there is room, and keep the model's answers. Equal arguments give equal samples.

    Args:
        model: dense, on its device; left as it was.
        processor: a Transformers processor, or a tokenizer. Where it prepares no chats with pictures, all samples are
            texts, with a warning.
        count: number of samples.
        sequence_length: tokens of a sample at most, those of pictures not counted.
        seed: of the beginnings and of every token drawn.
        on_step: told how many answers are written, of how many that are asked for so far.

    Returns:
        The model's forward arguments, one sample each, as `encode_samples` gives them.

    Raises:
        CalibrationError: the model cannot generate.
        SampleError: it writes nothing, or a picture cannot be prepared.
        NonFiniteError: its logits hold NaN or inf.
    """
    require_generation(model)
    visual = can_be_shown_pictures(model.config, processor)
    drafts = [
        _Draft.begin(sample, random.Random(f"self-written {seed} {index}"))
        for index, sample in enumerate(builtin_samples(count, seed, visual))
    ]
    _Author(model, processor, sequence_length, read_vocabulary(model, processor)).write(drafts, on_step)
    if not any(draft.written for draft in drafts):
        raise SampleError(
            f"the model wrote nothing for any of {count} calibration samples: it ends every one at once, or "
            f"sequence_length={sequence_length} leaves no room after the question; raise it, or {REMEDY}."
        )
    return [draft.inputs for draft in drafts]


@dataclass
class _Draft:
    """A sample in the making.

    Attributes:
        opening: a text, or a chat up to the question that is asked next.
        rng: source of every choice of this sample.
        questions: what is still to be asked.
        inputs: what stands, prompt and answer.
        written: tokens the model wrote, end tokens not counted.
    """

    opening: Sample
    rng: random.Random
    questions: list[dict[str, Any]] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)
    written: int = 0

    @classmethod
    def begin(cls, sample: str | list[dict[str, Any]], rng: random.Random) -> _Draft:
        """From a built-in sample: a sentence of the text, or the questions of the chat without the answers."""
        if isinstance(sample, str):
            starts = [found.start() for found in _SENTENCE_START.finditer(sample)]
            start = rng.choice(starts)
            return cls(sample[start : start + _SENTENCE], rng)
        first, *others = [message for message in sample if message["role"] == "user"]
        return cls([first], rng, others)

    def ask(self, answer: str) -> bool:
        """Put the next question behind the model's answer; False if there is none or the answer is empty."""
        if isinstance(self.opening, str) or not self.questions or not answer:
            return False
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        self.opening = [*self.opening, reply, self.questions.pop(0)]
        return True


@dataclass(frozen=True)
class _Author:
    """The model and what is needed to let it write."""

    model: Any
    processor: Any
    sequence_length: int
    vocabulary: Vocabulary

    def write(self, drafts: Sequence[_Draft], on_step: OnStep) -> None:
        """Fill the drafts: all first answers, then all second ones, and so on, so that batches stay full."""
        first = encode_samples([d.opening for d in drafts], self.processor, _UNCUT, answer_follows=True)
        for draft, inputs in zip(drafts, first, strict=True):
            draft.inputs = self._shortened(inputs, draft)
        prompts = [(d, d.inputs) for d in drafts if self._room(d.inputs) > 0]
        before = 0
        while prompts:
            asked = [Prompt(inputs, self._room(inputs), d.rng) for d, inputs in prompts]
            answers = continue_prompts(self.model, asked, self.vocabulary, _further(on_step, before))
            before += len(asked)
            following = []
            for (draft, inputs), answer in zip(prompts, answers, strict=True):
                draft.inputs = extend_inputs(inputs, answer.tokens)
                draft.written += sum(token not in self.vocabulary.ends for token in answer.tokens)
                question = self._next_prompt(draft, answer)
                if question is not None:
                    following.append((draft, question))
            prompts = following

    def _next_prompt(self, draft: _Draft, answer: Continuation) -> dict[str, Any] | None:
        """The chat so far with one more question, if the answer came to its end and there is room for another."""
        if not answer.ended or not draft.ask(self._text(answer)):
            return None
        try:
            inputs = encode_samples([draft.opening], self.processor, _UNCUT, answer_follows=True)[0]
        except SampleError:  # the answer spells a picture's placeholder; the chat ends with it
            return None
        return inputs if self._room(inputs) > 0 else None

    def _shortened(self, inputs: dict[str, Any], draft: _Draft) -> dict[str, Any]:
        """A text's first few tokens; a chat is cut only where it has no picture, as everywhere in the calibration."""
        tokens = inputs["input_ids"].shape[-1]
        if isinstance(draft.opening, str):
            return cut_inputs(inputs, min(draft.rng.randint(*OPENING), max(1, self.sequence_length // 2)))
        if token_modalities(inputs, self.model.config).count(TEXT) == tokens:
            return cut_inputs(inputs, self.sequence_length)
        return inputs

    def _room(self, inputs: dict[str, Any]) -> int:
        """Tokens that may follow."""
        return self.sequence_length - token_modalities(inputs, self.model.config).count(TEXT)

    def _text(self, answer: Continuation) -> str:
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        tokens = [token for token in answer.tokens if token not in self.vocabulary.ends]
        return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _further(on_step: OnStep, before: int) -> OnStep:
    """Counts on from an earlier round."""
    return lambda done, total: on_step(before + done, before + total)
